"""Finish a merge: take the files that the graph wrote from one side, and rerun the graph.

    git merge other                    # conflicts in dvc.lock and metrics
    edit params.yaml; git add params.yaml
    python -m pipeline merge           # the rest; then `git commit`

dvc.lock and metrics are results of the params, so merging their lines is never right. `dvc repro`
takes results of either side from the run cache (`dvc fetch --run-cache` fetches those of another
machine) and runs the rest with the merged params.
"""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from pipeline.commands.repository import LOCK, RepositoryError, git, in_conflict
from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.stage_runtime.errors import PipelineError
from pipeline.stage_runtime.progress import say

HERE = Path()


class MergeError(PipelineError):
    """A merge has conflicts that only a person can resolve."""


def main() -> None:
    """Resolve, rerun and stage what the graph writes."""
    parser = parser_of("merge", __doc__ or "")
    parser.add_argument("--no-repro", action="store_true", help="do not run the graph")
    options = parser.parse_args()
    with one_line_errors():
        conflicts = set(
            git(HERE, "diff", "--name-only", "--diff-filter=U", "--relative").splitlines()
        )
        if "dvc.yaml" in conflicts or in_conflict(Path("dvc.yaml")):
            raise MergeError("dvc.yaml is in conflict; resolve it, `git add` it, and start again")
        # Before DVC reads anything: it can't if dvc.lock is in conflict.
        for file in sorted(conflicts & {LOCK}):
            _take(file)
        written = _written()
        for file in sorted(conflicts & written):
            _take(file)
        others = sorted(conflicts - written - {LOCK})
        if others:
            raise MergeError(
                f"still in conflict: {', '.join(others)}; resolve, `git add`, and start again"
            )
        say(f"taken from this side: {len(conflicts)} files that the graph writes")
        if options.no_repro:
            return
        if subprocess.run([sys.executable, "-m", "dvc", "repro"], check=False).returncode:
            raise MergeError("the graph did not finish; start again, or run `dvc repro`")
        here = [file for file in sorted(written | {LOCK}) if Path(file).exists()]
        git(HERE, "add", "--", *here)
        say("the graph's outputs match the merged params; run `git commit` to finish the merge")


def _written() -> set[str]:
    """Return the outputs of stages that Git tracks: metrics and plots."""
    from dvc.repo import Repo

    here = Path.cwd().resolve()
    with Repo() as repo:
        paths = [Path(out.fs_path).resolve() for out in repo.index.outs if not out.use_cache]
    return {path.relative_to(here).as_posix() for path in paths if path.is_relative_to(here)}


def _take(file: str) -> None:
    """Take this side of a file in conflict, or the other side if this one has none."""
    for side in ("--ours", "--theirs"):
        with suppress(RepositoryError):
            git(HERE, "checkout", side, "--", file)
            git(HERE, "add", "--", file)
            return
    git(HERE, "rm", "--quiet", "--cached", "--", file)
