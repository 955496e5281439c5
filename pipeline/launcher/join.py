"""Share the work of the stages that another host runs.

    PIPELINE_MEET=10.0.0.1:29400 python -m pipeline join

In the project's folder, which all hosts see at the same place, with its caches. PIPELINE_MEET is
where the host meets the others that runs `PIPELINE_HOSTS=1:2 PIPELINE_MEET=... dvc repro`. It waits
for stages until it is ended (Ctrl-C).
"""

import os
import time

from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.launcher.launch import LOST, SHARED, offered, take_part
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.settings import meeting_point

LOOK = 0.5  # seconds between two looks


def main() -> None:
    """Take part in each stage that is offered, and again when it starts anew without a lost host.

    Where one host is enough, not in a stage that runs already: it would have to start anew.
    """
    parser_of("join", __doc__ or "").parse_args()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else warns of names of addresses
    with one_line_errors("left; the stage goes on without this host if it may"):
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
                say(f"{stage}: " + ("done" if code == 0 else "given up here"))
