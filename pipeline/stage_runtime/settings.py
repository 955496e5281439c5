"""Where and how fast: read from the environment, never from params, and never in a result."""

import os
from pathlib import Path
from typing import NamedTuple

from pipeline.stage_runtime.errors import SettingError


class Hosts(NamedTuple):
    """How many hosts may share a stage."""

    least: int
    most: int


def threads() -> int:
    """Count the processors this process may use; PIPELINE_THREADS overrides it.

    Processes on one machine that share a stage share its processors.
    """
    all_here = _whole("PIPELINE_THREADS", 0) or processors()
    return max(1, all_here // _whole("LOCAL_WORLD_SIZE", 1, least=1))


def processors() -> int:
    """Count the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux: fewer in a container, or a job of Slurm's
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processes() -> int:
    """Give how many processes shall share a stage on this machine: PIPELINE_PROCESSES."""
    return _whole("PIPELINE_PROCESSES", 1, least=1)


def hosts() -> Hosts:
    """Give how many hosts shall share a stage: PIPELINE_HOSTS, as 2 or, from one to two, 1:2."""
    said = os.environ.get("PIPELINE_HOSTS", "") or "1"
    least, _, most = said.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal()) or not (
        1 <= int(least) <= int(most or least)
    ):
        raise SettingError(f"PIPELINE_HOSTS = {said!r}: expected a number such as 2, or 1:2")
    return Hosts(int(least), int(most or least))


def meeting_point() -> tuple[str, int]:
    """Give where hosts meet: PIPELINE_MEET, the host that runs DVC and a free port, a:29400."""
    said = os.environ.get("PIPELINE_MEET", "")
    host, _, port = said.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise SettingError(
            f"PIPELINE_MEET = {said!r}: expected where hosts meet, such as 10.0.0.1:29400: the "
            "address of the one that runs DVC, and a free port of it"
        )
    return host, int(port)


def launcher() -> str:
    """Give the command that starts the processes that share a stage: PIPELINE_LAUNCHER."""
    return os.environ.get("PIPELINE_LAUNCHER", "")


def world_size() -> int:
    """Count the processes that share this stage, as torchrun and Kubernetes tell them."""
    return _whole("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """Give this process's place among them; the first, 0, is the one that writes."""
    return _whole("RANK", 0)


def is_elastic() -> bool:
    """Tell whether the stage goes on with fewer processes when a host is lost."""
    return hosts().least < hosts().most or _whole("TORCHELASTIC_MAX_RESTARTS", 0) > 0


def local_rank() -> int:
    """Give this process's place among those on its machine."""
    return _whole("LOCAL_RANK", 0)


def device_asked() -> str:
    """Return the device that PIPELINE_DEVICE asks for: cpu, cuda, mps, or empty for none."""
    said = os.environ.get("PIPELINE_DEVICE", "")
    if said not in ("", "cpu", "cuda", "mps"):
        raise SettingError(f"PIPELINE_DEVICE = {said!r}: expected cpu, cuda or mps")
    return said


def collective_timeout() -> float:
    """Give how long processes wait for each other, in seconds: PIPELINE_PATIENCE_SECONDS."""
    return _number("PIPELINE_PATIENCE_SECONDS", 600)


def cache_folder() -> Path:
    """Give the folder for what can be computed again; PIPELINE_CACHE names another disk."""
    folder = Path(os.environ.get("PIPELINE_CACHE", ".pipeline"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_bytes() -> float:
    """Give how much may be put there; PIPELINE_CACHE_GB overrides 16."""
    return _number("PIPELINE_CACHE_GB", 16) * 1e9


def save_seconds() -> float:
    """Give how often what a long task has done is saved; PIPELINE_SAVE_SECONDS overrides 60."""
    return _number("PIPELINE_SAVE_SECONDS", 60)


def _number(name: str, default: float) -> float:
    said = os.environ.get(name, "")
    try:
        value = float(said or default)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise SettingError(f"the environment's {name} = {said!r}: expected a number from 0 on")
    return value


def _whole(name: str, default: int, least: int = 0) -> int:
    said = os.environ.get(name, "")
    if said and not (said.isdecimal() and int(said) >= least):
        raise SettingError(
            f"the environment's {name} = {said!r}: expected a number from {least} on"
        )
    return int(said or default)
