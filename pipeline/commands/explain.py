"""Explain for each stage whether `dvc repro` would run it, and why.

    python -m pipeline explain
    python -m pipeline explain stage2 --json

A stage runs again if a param, an input or an output differs from dvc.lock; the stages after it run
again if its outputs change. If an earlier run had the same params and files, its results are taken
from the run cache instead. This command runs and changes nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.commands.repository import refuse_unreadable_lock
from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.stage_runtime.errors import ParamError, PipelineError, suggest
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import flat

if TYPE_CHECKING:
    # Half a second to import, which `--help` need not wait for.
    from dvc.dependency import ParamsDependency
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

Answer = Literal["up to date", "runs", "from the run cache", "runs perhaps", "frozen"]


@dataclass(frozen=True)
class Explained:
    """What `dvc repro` would do with a stage."""

    stage: str
    answer: Answer
    because: list[str]
    seconds: float | None  # what it took last time


class GraphError(PipelineError):
    """The folder holds no graph that DVC can read."""


def explained(root: Path) -> list[Explained]:
    """Explain all stages of the project at `root`, each after its dependencies.

    Raises GraphError if DVC can't read it, RepositoryError if it can't read dvc.lock alone.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo, repo.lock:
            return list(_stages(repo))
    except DvcException as error:
        refuse_unreadable_lock(root)
        said = " ".join(str(error).split())
        raise GraphError(f"{root}: DVC can't read the graph here ({said})") from None


def _stages(repo: "Repo") -> Iterator[Explained]:
    import networkx

    runs: dict[Any, Answer] = {}
    for stage in networkx.dfs_postorder_nodes(repo.index.graph):
        if not hasattr(stage, "name"):  # a single file, tracked by `dvc add`
            continue
        above = {s.name: runs[s] for s in repo.index.graph.successors(stage) if s in runs}
        because = list(_reasons(stage))
        waits = [name for name, answer in above.items() if answer != "up to date"]
        answer: Answer = "up to date"
        if stage.frozen:
            answer, because = "frozen", ["frozen in dvc.yaml: it doesn't run, whatever changes"]
        elif because:
            answer = "from the run cache" if not waits and _is_cached(repo, stage) else "runs"
        elif waits:
            answer = "runs perhaps"
        if waits and answer != "frozen":
            because += [f"{name} comes before it" for name in waits]
        runs[stage] = "up to date" if answer == "frozen" else answer
        yield Explained(stage.name, answer, because, _seconds(stage))


def _reasons(stage: "PipelineStage") -> Iterator[str]:
    """Describe what differs from dvc.lock: the command, params, files, outputs."""
    from dvc.dependency import ParamsDependency

    if not any(out.hash_info for out in stage.outs):
        yield "it has never run, or dvc.lock was lost"
        return
    if stage.cmd_changed:
        yield "its command in dvc.yaml has changed"
    for dependency in stage.deps:
        if isinstance(dependency, ParamsDependency):
            yield from _changed(dependency)
        else:
            for path, how in dependency.status().items():
                yield f"{path} is {how}"
    for out in stage.outs:
        for path, how in out.status().items():
            yield f"its output {path} is {_of_output(how)}"


def _changed(dependency: "ParamsDependency") -> Iterator[str]:
    """Describe the params that differ from dvc.lock."""
    old = dependency.hash_info.value or {}
    new = dependency.read_params()
    file = "" if dependency.fs_path.endswith("params.yaml") else f"{dependency.def_path}: "
    old, new = dict(flat(old)), dict(flat(new))  # of sections each key
    for key in {**old, **new}:
        if key not in new:
            yield f"{file}{key} is missing"
        elif key not in old:
            yield f"{file}{key} = {new[key]!r} is new"
        elif old[key] != new[key]:
            yield f"{file}{key}: {_short(old[key])} → {_short(new[key])}"


def _of_output(how: str) -> str:
    return {
        "deleted": "missing",
        "not in cache": "missing, also from the cache (`dvc pull` may have it)",
        "modified": "not what it wrote",
    }.get(how, how)


def _short(value: object) -> str:
    said = json.dumps(value, ensure_ascii=False)
    return said if len(said) <= 60 else f"{said[:57]}..."


def _is_cached(repo: "Repo", stage: "PipelineStage") -> bool:
    """Return whether the run cache has the outputs of this stage for its present inputs."""
    from dvc.exceptions import DvcException

    try:
        stage.save_deps()  # the present hashes, only in memory
        return repo.stage_cache._load(stage) is not None
    except DvcException:  # a file is missing
        return False


def _seconds(stage: "PipelineStage") -> float | None:
    """Return the seconds that a stage took last time, from timing.json among its outputs."""
    files = (Path(out.fs_path) for out in stage.outs)
    try:
        timing = next(file for file in files if file.name == "timing.json")
        return float(json.loads(timing.read_text(encoding="utf-8"))[stage.name]["seconds"])
    except (StopIteration, OSError, ValueError, KeyError):
        return None


def main() -> None:
    """Print the explanation on the terminal."""
    parser = parser_of("explain", __doc__ or "")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="only these (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with one_line_errors():
        found = explained(Path())
        known = [one.stage for one in found]
        for name in options.stages:
            if name not in known:
                raise ParamError(f"no stage is called {name!r}; {suggest(name, known)}")
        shown = [one for one in found if not options.stages or one.stage in options.stages]
        if options.json:
            print(json.dumps([asdict(one) for one in shown], indent=2, ensure_ascii=False))
            return
        width = max(len(one.stage) for one in shown)
        for one in shown:
            took = f"  (took {one.seconds:.0f} s last time)" if one.seconds is not None else ""
            say(f"{one.stage:<{width}}  {one.answer}{took if one.answer != 'up to date' else ''}")
            for reason in one.because:
                say(f"{'':<{width}}    {reason}")
