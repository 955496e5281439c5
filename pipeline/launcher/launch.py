"""Start several processes on one stage: by PyTorch's elastic launcher, what torchrun runs.

On this host alone, or on several that meet (`python -m pipeline join` on the others): there the one
that runs DVC offers each stage, and goes on with who is left when a host is lost. Or by a command
such as srun.
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

# Stages that several processes may share, where they are wanted.
SHARED = ("extract", "stage1", "stage2", "evaluate")
LOST = ProcessGroupError.exit_code
OFFER = "pipeline/offer"  # a key in the store of the host that runs DVC
REACH_SECONDS = 5  # to reach that store, and for hosts to come once enough are there


@dataclass(frozen=True)
class Work:
    """A stage that is shared, as the host that runs DVC offers it."""

    run: str
    attempt: int  # a run has several, one more than hosts it lost
    stage: str
    arguments: Sequence[str]
    least: int  # hosts
    most: int


def is_shared() -> bool:
    """Tell whether several processes are wanted."""
    return processes() > 1 or hosts().most > 1 or bool(launcher())


def launch(stage: str, arguments: Sequence[str]) -> int:
    """Run a stage in several processes; gives the exit code.

    One that dies ends the others: the stage goes on from what it saved when it is started again.
    Raises SettingError where hosts can't meet.
    """
    if launcher():
        return _by_command(stage, arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else warns of names of addresses
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
            f"PIPELINE_MEET = {meet[0]}:{meet[1]}: can't listen there ({said}); it has to be an "
            "address of this host, and a port that is free"
        ) from None
    if least > 1:
        say(f"waiting for {least} hosts; `python -m pipeline join` makes one take part")
    for attempt in count():
        work = Work(run, attempt, stage, arguments, least, most)
        store.set(OFFER, json.dumps(asdict(work)))
        code = take_part(work, meet, leads=True)
        if code != LOST:
            return code
        say("a host is lost; going on with those that are left")
    raise AssertionError("counting doesn't end")


def offered(meet: tuple[str, int]) -> Work | None:
    """Ask the host that runs DVC for the stage it shares; None while there is none."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        # First by hand: PyTorch warns at length where nobody listens.
        socket.create_connection(meet, REACH_SECONDS).close()
        limit = timedelta(seconds=REACH_SECONDS)
        store = TCPStore(*meet, is_master=False, multi_tenant=True, timeout=limit)
        return Work(**json.loads(store.get(OFFER)))
    except (OSError, RuntimeError, ValueError, TypeError):  # nobody, or nobody of ours
        return None


def take_part(work: Work, meet: tuple[str, int], leads: bool) -> int:
    """Run this host's processes of a stage; gives 0, LOST where others are gone, or 1."""
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
            # Who failed has said why.
            codes = {failure.exitcode for failure in error.failures.values()}
            return LOST if codes == {LOST} else 1
        except SignalException:
            return 1
        except (RendezvousError, DistError) as error:
            if leads:
                raise SettingError(
                    f"PIPELINE_HOSTS = {work.least}:{work.most}: not so many hosts came "
                    f"({type(error).__name__}); start `python -m pipeline join` there, or ask "
                    "for fewer"
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
    """Raise SettingError where srun started several tasks that nothing makes one group.

    Of the step, not the job: a batch script has the job's variables too, and is one process.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and world_size() == 1:
        raise SettingError(
            f"srun started {tasks} tasks that do not know each other; have it start one torchrun "
            "a host, as docs/processes.md shows"
        )
