"""What Git and DVC hold of a project, for commands that look at it or change it."""

import subprocess
from pathlib import Path
from typing import Any

from pipeline.stage_runtime.errors import PipelineError
from pipeline.stage_runtime.schema import flat


class RepositoryError(PipelineError):
    """Git refuses a command."""


def git(folder: Path, *words: str) -> str:
    """Run a command of Git in a folder; gives what it prints, without the last line's end.

    Raises RepositoryError with what Git says, OSError where there is no Git.
    """
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RepositoryError(f"git {words[0]}: {' '.join(done.stderr.split())[:200]}")
    return done.stdout.rstrip("\n")


def params_run_with(lock: dict[str, Any]) -> dict[str, Any]:
    """Gather the params by which the stages of a dvc.lock were run, under dotted keys."""
    params: dict[str, Any] = {}
    for stage in lock.get("stages", {}).values():
        params |= dict(flat(stage.get("params", {}).get("params.yaml", {})))
    return params
