"""Where and how fast: read from the environment, never from params, and never in a result."""

import os
from pathlib import Path


def threads() -> int:
    """Count the processors this process may use; PIPELINE_THREADS overrides it.

    Processes on one machine that share a stage share its processors.
    """
    all_here = int(os.environ.get("PIPELINE_THREADS", "0")) or len(os.sched_getaffinity(0))
    return max(1, all_here // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def processes() -> int:
    """Give how many processes shall share a stage on this machine: PIPELINE_PROCESSES."""
    return int(os.environ.get("PIPELINE_PROCESSES", "1"))


def team_size() -> int:
    """Count the processes that share this stage, as torchrun and Kubernetes tell them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Give this process's place among them; the first, 0, is the one that writes."""
    return int(os.environ.get("RANK", "0"))


def patience() -> float:
    """Give how long processes wait for each other, in seconds: PIPELINE_PATIENCE_SECONDS."""
    return float(os.environ.get("PIPELINE_PATIENCE_SECONDS", "600"))


def cache_folder() -> Path:
    """Give the folder for what can be computed again; PIPELINE_CACHE names another disk."""
    folder = Path(os.environ.get("PIPELINE_CACHE", ".pipeline"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_bytes() -> float:
    """Give how much may be put there; PIPELINE_CACHE_GB overrides 16."""
    return float(os.environ.get("PIPELINE_CACHE_GB", "16")) * 1e9


def save_seconds() -> float:
    """Give how often what a long task has done is saved; PIPELINE_SAVE_SECONDS overrides 60."""
    return float(os.environ.get("PIPELINE_SAVE_SECONDS", "60"))
