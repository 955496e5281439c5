"""Start several processes for one stage, with PyTorch's elastic launcher, as torchrun does.

They run on this host alone, or on several (`python -m pipeline join` on the others): the host that
runs DVC offers each stage, and continues with the remaining hosts if one is lost. Alternatively, a
command such as srun starts them.
"""

import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import count

from pipeline.launcher.supervise import LAUNCHED, dying_with_us
from pipeline.stage_runtime.distributed import address_towards
from pipeline.stage_runtime.errors import ProcessGroupError, SettingError, one_line
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.settings import (
    hosts,
    launcher,
    meeting_point,
    processes,
    threads,
    world_size,
)

# Stages that several processes can share.
SHARED = ("extract", "stage1", "stage2", "evaluate")
LOST = ProcessGroupError.exit_code
OFFER = "pipeline/offer"  # a key in the store of the host that runs DVC
REACH_SECONDS = 5  # to reach that store, and for more hosts to join once there are enough


@dataclass(frozen=True)
class Work:
    """A shared stage, as the host that runs DVC offers it."""

    run: str
    attempt: int  # from 0; each lost host of a run adds one
    stage: str
    arguments: Sequence[str]
    least: int  # hosts
    most: int


def is_shared() -> bool:
    """Return whether several processes are requested."""
    return processes() > 1 or hosts().most > 1 or bool(launcher())


def launch(stage: str, arguments: Sequence[str]) -> int:
    """Run a stage in several processes; return the exit code.

    If a process dies, the others are ended; when started again, the stage resumes from its saved
    state. Raises SettingError if the hosts can't connect.
    """
    if launcher():
        return _by_command(stage, arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else it warns about host names
    least, most = hosts()
    run = uuid.uuid4().hex
    if most == 1:
        return take_part(Work(run, 0, stage, arguments, 1, 1), ("127.0.0.1", 0), leads=True)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    meet = meeting_point()
    limit = timedelta(seconds=REACH_SECONDS)
    try:
        store = TCPStore(*meet, is_master=True, multi_tenant=True, timeout=limit)
    except RuntimeError as error:
        said = one_line(error, 120)
        raise SettingError(
            f"PIPELINE_MEET = {meet[0]}:{meet[1]}: can't listen there ({said}); set it to an "
            "address of this host and a free port"
        ) from None
    if least > 1:
        say(f"waiting for {least} hosts; run `python -m pipeline join` on the others")
    for attempt in count():
        work = Work(run, attempt, stage, arguments, least, most)
        store.set(OFFER, json.dumps(asdict(work)))
        code = take_part(work, meet, leads=True)
        if code != LOST:
            return code
        say("a host was lost; continuing with the remaining ones")
    raise AssertionError("counting doesn't end")


def offered(meet: tuple[str, int]) -> Work | None:
    """Return the stage that the host that runs DVC offers; None while there is none."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        # First without PyTorch, which prints long warnings if nothing listens there.
        socket.create_connection(meet, REACH_SECONDS).close()
        limit = timedelta(seconds=REACH_SECONDS)
        store = TCPStore(*meet, is_master=False, multi_tenant=True, timeout=limit)
        return Work(**json.loads(store.get(OFFER)))
    except (OSError, RuntimeError, ValueError, TypeError):  # no listener, or another program
        return None


def take_part(work: Work, meet: tuple[str, int], leads: bool) -> int:
    """Run this host's processes of a stage; return 0, LOST if other processes are gone, or 1."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    each = max(1, threads() // processes())
    os.environ |= {
        LAUNCHED: "1",
        "PIPELINE_HOSTS": f"{work.least}:{work.most}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(each)),
    }
    with tempfile.TemporaryDirectory(prefix="pipeline-") as logs:
        config = LaunchConfig(
            min_nodes=work.least,
            max_nodes=work.most,
            nproc_per_node=processes(),
            run_id=f"{work.run}-{work.attempt}",
            rdzv_backend="c10d",
            rdzv_endpoint=f"{meet[0]}:{meet[1]}",
            rdzv_configs={"is_host": leads, "last_call_timeout": REACH_SECONDS},
            local_addr=address_towards(*meet),
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "pipeline", work.stage, *work.arguments)
        except ChildFailedError as error:
            # The failed process has printed why.
            codes = {failure.exitcode for failure in error.failures.values()}
            return LOST if codes == {LOST} else 1
        except SignalException:
            return 1
        except (RendezvousError, DistError) as error:
            if leads:
                raise SettingError(
                    f"PIPELINE_HOSTS = {work.least}:{work.most}: too few hosts joined "
                    f"({type(error).__name__}); run `python -m pipeline join` on the others, or "
                    "set a lower number"
                ) from None
            return LOST
    return 0


def _by_command(stage: str, arguments: Sequence[str]) -> int:
    words = [*shlex.split(launcher()), sys.executable, "-m", "pipeline", stage, *arguments]
    env = {**os.environ, LAUNCHED: "1"}
    try:
        # This process has no other threads yet.
        process = subprocess.Popen(words, env=env, preexec_fn=dying_with_us())  # noqa: S603, PLW1509
    except OSError as error:
        raise SettingError(f"PIPELINE_LAUNCHER = {launcher()!r}: {error.strerror}") from None
    return 1 if process.wait() else 0


def refuse_lone_tasks() -> None:
    """Raise SettingError if srun started several tasks that form no process group.

    The variable is the step's, not the job's: a batch script has the job's too, and is one process.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and world_size() == 1:
        raise SettingError(
            f"srun started {tasks} tasks that form no process group; have it start one torchrun "
            "per host, as docs/processes.md shows"
        )
