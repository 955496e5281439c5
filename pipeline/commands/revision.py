"""Read the files of a commit, an experiment or the working tree, wherever DVC keeps them."""

import csv
import io
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml.error import YAMLError

from pipeline.commands.repository import params_run_with
from pipeline.stage_runtime.errors import PipelineError
from pipeline.stage_runtime.schema import STAGES, load_yaml

HERE = "."
INDEX = "data/prepared/index.csv"
OUT_OF_FOLD = "models/probe/out_of_fold.csv"
FOLD = "prepare.test_fold"
BLEND = "blend"
MODELS = ("probe_linear", "probe", "stage1", "stage2", BLEND)
SHOWN = 8  # changed params that are named
Text = Callable[[str], str]  # the text of a file, by its path in the project


class RunError(PipelineError):
    """A revision holds no finished run, or its files are missing."""


def shown(revision: str) -> str:
    """Return the name that a revision is shown with."""
    return "here" if revision == HERE else revision


@contextmanager
def files_of(revision: str) -> Iterator[Text]:
    """Open a revision, or the working tree, for reading.

    Raises RunError if it doesn't exist, or if the block reads a file that it lacks.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.scm import SCM, SCMError

    files: DVCFileSystem | None = None
    below = PurePosixPath()  # the project's path in the repository

    def text(path: str) -> str:
        if files is None:
            return Path(path).read_text(encoding="utf-8")
        return str(files.read_text((below / path).as_posix(), encoding="utf-8"))

    try:
        if revision != HERE:
            files = DVCFileSystem(".", rev=revision, subrepos=True)
            root = Path(SCM(".", search_parent_directories=True).root_dir).resolve()
            below = PurePosixPath(Path.cwd().resolve().relative_to(root).as_posix())
        yield text
    except FileNotFoundError as error:
        path = error.filename or str(error)
        raise RunError(f"{revision}: it has no {path}; run `dvc repro`, and commit") from None
    except (DvcException, SCMError, ValueError) as error:
        raise RunError(f"{revision}: no run to read ({' '.join(str(error).split())})") from None


def stale(
    revision: str, params: dict[str, Any], text: Text, stages: Collection[str] = STAGES
) -> list[str]:
    """List the params that differ from those that stages were run with, and print them.

    If params were committed without running the graph, dvc.lock has those that it ran with.
    """
    try:
        lock = load_yaml(text("dvc.lock")) or {}
    except (FileNotFoundError, YAMLError):
        return []
    ran = params_run_with(lock, stages)
    others = [key for key in ran if key in params and params[key] != ran[key]]
    if others:
        said = [f"{key} = {params[key]}, run with {ran[key]}" for key in others[:SHOWN]]
        note(
            f"{shown(revision)}: its results were not made with its params.yaml "
            f"({', '.join(said)}); run `dvc repro`"
        )
    return [f"{key} = {ran[key]}" for key in others]


@dataclass(frozen=True)
class Indexed:
    """An image of index.csv."""

    key: str  # path and content
    group: int
    split: str


def images_of(revision: str, text: Text) -> dict[str, Indexed]:
    """Return the images of a revision by path; none, and say so, if DVC's cache lacks the list."""
    try:
        rows = list(csv.DictReader(io.StringIO(text(INDEX))))
        return {
            row["path"]: Indexed(f"{row['path']} {row['sha256']}", int(row["group"]), row["split"])
            for row in rows
        }
    except Exception:  # each layer of DVC raises its own for what isn't in the cache
        note(f"{shown(revision)}: data/prepared is missing (`dvc fetch` may have it)")
        return {}


def right_of(
    revision: str, text: Text, file: str, images: dict[str, Indexed]
) -> dict[str, dict[str, bool]] | None:
    """Return, by model, whether a file of predictions has each image right, by its key.

    None if there are no images, or, which is said, if DVC's cache lacks the file.
    """
    if not images:
        return None
    try:
        rows = list(csv.DictReader(io.StringIO(text(file))))
    except Exception:
        note(f"{shown(revision)}: {file} is missing (`dvc fetch` may have it): accuracies alone")
        return None
    if any(row["path"] not in images for row in rows):
        note(f"{shown(revision)}: {file} has other images than {INDEX}; run `dvc repro`")
        return None
    return {
        model: {images[r["path"]].key: r[model] == r["label"] for r in rows if r[model]}
        for model in MODELS
        if rows and model in rows[0]
    }


def experiments() -> list[str]:
    """List the names of DVC's experiments on the last commit."""
    from dvc.repo import Repo

    found = [name for names in Repo().experiments.ls().values() for name, _ in names]
    if not found:
        raise RunError("no experiments on the last commit; `dvc exp run` makes some")
    return sorted(found)


def note(line: str) -> None:
    """Print a line that is no result."""
    print(line, file=sys.stderr)
