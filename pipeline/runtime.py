"""Where and how fast: read from the environment, never from params, and never in a result."""

import os
from pathlib import Path


def threads() -> int:
    """Count the processors this process may use; PIPELINE_THREADS overrides it."""
    return int(os.environ.get("PIPELINE_THREADS", "0")) or len(os.sched_getaffinity(0))


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
