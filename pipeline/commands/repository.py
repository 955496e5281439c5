"""Access to a project's Git repository and dvc.lock, for the commands."""

import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.stage_runtime.errors import PipelineError
from pipeline.stage_runtime.schema import STAGES, flat


class RepositoryError(PipelineError):
    """A Git command failed."""


def git(folder: Path, *words: str) -> str:
    """Run a Git command in a folder; return its output, without the last newline.

    Raises RepositoryError with Git's message, OSError if Git is missing.
    """
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RepositoryError(f"git {words[0]}: {' '.join(done.stderr.split())[:200]}")
    return done.stdout.rstrip("\n")


def params_run_with(lock: dict[str, Any], stages: Collection[str] = STAGES) -> dict[str, Any]:
    """Return the params that the stages of a dvc.lock were run with, by dotted keys."""
    params: dict[str, Any] = {}
    for name, stage in lock.get("stages", {}).items():
        if name in stages:
            params |= dict(flat(stage.get("params", {}).get("params.yaml", {})))
    return params
