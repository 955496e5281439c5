"""Take part in the stages that another host runs.

    PIPELINE_MEET=10.0.0.1:29400 python -m pipeline join

Run it in the project's folder, which all hosts must see at the same path, including its caches.
PIPELINE_MEET is the rendezvous endpoint, as on the host that runs `PIPELINE_HOSTS=1:2
PIPELINE_MEET=... dvc repro`. The command waits for stages until you press Ctrl-C.
"""

import os
import time

from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.launcher.launch import LOST, SHARED, offered, take_part
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.settings import meeting_point

LOOK = 0.5  # seconds between two queries


def main() -> None:
    """Take part in each offered stage, and again when it restarts after a host was lost.

    If one host is enough, a stage that is already running is skipped: it would have to restart.
    """
    parser_of("join", __doc__ or "").parse_args()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else it warns about host names
    with one_line_errors("left; the stage continues without this host if PIPELINE_HOSTS allows it"):
        meet, done = meeting_point(), ""
        say(f"waiting for stages from {meet[0]}:{meet[1]}")
        running = offered(meet)
        last = (running.run, running.attempt) if running and running.least == 1 else None
        while True:
            work = offered(meet)
            stage = work.stage if work else ""
            known = work and (work.run == done or (work.run, work.attempt) == last)
            if work is None or known or stage not in SHARED:
                time.sleep(LOOK)
                continue
            say(f"{stage}: taking part")
            code, last = take_part(work, meet, leads=False), (work.run, work.attempt)
            if code != LOST:
                done = work.run
                say(f"{stage}: " + ("done" if code == 0 else "failed here"))
