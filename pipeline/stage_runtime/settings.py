"""Settings from environment variables: where and how fast stages run, never what they compute."""

import os
from pathlib import Path
from typing import NamedTuple

from pipeline.stage_runtime.errors import SettingError


class Hosts(NamedTuple):
    """The lowest and the highest number of hosts that share a stage."""

    least: int
    most: int


def threads() -> int:
    """Return the number of threads of this process: one per processor, or PIPELINE_THREADS.

    Processes on one machine that share a stage divide them.
    """
    all_here = _whole("PIPELINE_THREADS", 0) or processors()
    return max(1, all_here // _whole("LOCAL_WORLD_SIZE", 1, least=1))


def processors() -> int:
    """Return the number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux: fewer in a container or a Slurm job
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processes() -> int:
    """Return the number of processes that share a stage on this machine: PIPELINE_PROCESSES."""
    return _whole("PIPELINE_PROCESSES", 1, least=1)


def hosts() -> Hosts:
    """Return the number of hosts that share a stage: PIPELINE_HOSTS, such as 2, or 1:2."""
    said = os.environ.get("PIPELINE_HOSTS", "") or "1"
    least, _, most = said.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal()) or not (
        1 <= int(least) <= int(most or least)
    ):
        raise SettingError(f"PIPELINE_HOSTS = {said!r}: expected a number such as 2, or 1:2")
    return Hosts(int(least), int(most or least))


def meeting_point() -> tuple[str, int]:
    """Return the rendezvous endpoint: PIPELINE_MEET, the host that runs DVC and a free port."""
    said = os.environ.get("PIPELINE_MEET", "")
    host, _, port = said.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise SettingError(
            f"PIPELINE_MEET = {said!r}: expected the address of the host that runs DVC and a free "
            "port on it, such as 10.0.0.1:29400"
        )
    return host, int(port)


def launcher() -> str:
    """Return the command that starts the processes that share a stage: PIPELINE_LAUNCHER."""
    return os.environ.get("PIPELINE_LAUNCHER", "")


def world_size() -> int:
    """Return the number of processes that share this stage, as set by torchrun or Kubernetes."""
    return _whole("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """Return this process's rank among them; only rank 0, the first process, writes."""
    return _whole("RANK", 0)


def is_elastic() -> bool:
    """Return whether the stage continues with fewer processes if a host is lost."""
    return hosts().least < hosts().most or _whole("TORCHELASTIC_MAX_RESTARTS", 0) > 0


def local_rank() -> int:
    """Return this process's rank among those on its machine."""
    return _whole("LOCAL_RANK", 0)


def device_asked() -> str:
    """Return the device that PIPELINE_DEVICE asks for: cpu, cuda, mps, or empty for none."""
    said = os.environ.get("PIPELINE_DEVICE", "")
    if said not in ("", "cpu", "cuda", "mps"):
        raise SettingError(f"PIPELINE_DEVICE = {said!r}: expected cpu, cuda or mps")
    return said


def collective_timeout() -> float:
    """Return how long processes wait for each other, in seconds: PIPELINE_PATIENCE_SECONDS."""
    return _number("PIPELINE_PATIENCE_SECONDS", 600)


def cache_folder() -> Path:
    """Return the cache folder, whose files can be recomputed; PIPELINE_CACHE overrides it."""
    folder = Path(os.environ.get("PIPELINE_CACHE", ".pipeline"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_bytes() -> float:
    """Return the size limit of the cache in bytes; PIPELINE_CACHE_GB overrides 16 GB."""
    return _number("PIPELINE_CACHE_GB", 16) * 1e9


def save_seconds() -> float:
    """Return the seconds between saves of a long task; PIPELINE_SAVE_SECONDS overrides 60."""
    return _number("PIPELINE_SAVE_SECONDS", 60)


def _number(name: str, default: float) -> float:
    said = os.environ.get(name, "")
    try:
        value = float(said or default)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise SettingError(f"environment variable {name} = {said!r}: expected a number >= 0")
    return value


def _whole(name: str, default: int, least: int = 0) -> int:
    said = os.environ.get(name, "")
    if said and not (said.isdecimal() and int(said) >= least):
        raise SettingError(
            f"environment variable {name} = {said!r}: expected a whole number >= {least}"
        )
    return int(said or default)
