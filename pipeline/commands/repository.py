"""Access to a project's Git repository and dvc.lock, for the commands."""

import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.stage_runtime.errors import PipelineError
from pipeline.stage_runtime.schema import STAGES, flat

LOCK = "dvc.lock"
CONFLICT = ("<<<<<<< ", "=======\n", ">>>>>>> ")  # Git's marks in a file


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


def in_conflict(file: Path) -> bool:
    """Return whether a file holds the marks of a merge that isn't resolved."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return all(mark in text for mark in CONFLICT)


def refuse_unreadable_lock(folder: Path) -> None:
    """Raise RepositoryError if DVC can't read dvc.lock: it was killed while it wrote the file.

    DVC writes over the old file, so that a kill leaves the first part of the new one.
    """
    from dvc.exceptions import DvcException
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from dvc.utils.strictyaml import load

    file = folder / LOCK
    if not file.exists():
        return
    try:
        load(str(file), COMPILED_LOCKFILE_SCHEMA, encoding="utf-8")
    except DvcException:
        remedy = (
            "it is in conflict; run `python -m pipeline merge`"
            if in_conflict(file)
            else "it is incomplete, as DVC was killed while writing it; delete it and run "
            "`dvc repro`: what had finished comes from the run cache"
        )
        raise RepositoryError(f"{LOCK}: {remedy}") from None
