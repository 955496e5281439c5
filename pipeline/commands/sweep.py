"""Run the graph for every combination of the given param values, as DVC experiments.

    python -m pipeline sweep -S seed=0,1,2
    python -m pipeline sweep -S stage2.lr=1e-5,5e-5 -S 'stage1.unfreeze=[],[conv_head]' --jobs 2
    python -m pipeline sweep -S backbone.name=torchvision/resnet18,torchvision/resnet50 --to probe
    python -m pipeline sweep -S 'prepare.test_fold=*/10'    # each image in one of ten test splits

Runs start from the last commit, each worker in its own clone below the cache folder. The clones
share DVC's cache, so results that don't depend on the changed params are computed once. If a sweep
is killed, start it again: finished runs are not repeated, and killed runs resume. `python -m
pipeline compare --experiments` compares the results, `python -m pipeline rank` those of the probes
alone; `dvc exp apply NAME` applies one of them here.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue

from filelock import FileLock, Timeout

from pipeline.commands.repository import RepositoryError, git
from pipeline.commands.revision import FOLD
from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.launcher.supervise import dying_with_us, interrupt
from pipeline.stage_runtime.errors import ParamError, PipelineError, one_line, suggest
from pipeline.stage_runtime.progress import duration, say, track
from pipeline.stage_runtime.schema import flat, load_yaml
from pipeline.stage_runtime.settings import cache_folder, threads

LONGEST_NAME = 60
LINKS = "reflink,hardlink,symlink,copy"  # to DVC's cache, the cheapest that the disk supports
RECOVER = "run the same command to resume"


class SweepError(PipelineError):
    """A sweep can't start, or some of its runs failed."""


@dataclass(frozen=True)
class Planned:
    """One run: a value for each swept param."""

    name: str  # the experiment's
    settings: tuple[str, ...]  # KEY=VALUE


def planned(settings: Sequence[str], known: Sequence[str], to: str = "") -> list[Planned]:
    """Combine all values of all settings, each KEY=VALUE,VALUE,... with a known key.

    Raises ParamError for any other setting, or for a key that isn't in params.yaml.
    """
    choices = []
    for setting in settings:
        key, equals, values = setting.partition("=")
        if not equals or not values:
            raise ParamError(f"-S {setting}: expected KEY=VALUE, or KEY=VALUE,VALUE,...")
        if key not in known:
            raise ParamError(f"-S {setting}: no {key!r} in params.yaml; {suggest(key, known)}")
        found = [value for given in _values(values) for value in _all_folds(key, given)]
        choices.append([f"{key}={value}" for value in found])
    runs = [Planned(_name(chosen, to), chosen) for chosen in itertools.product(*choices)]
    twice = {run.name for run in runs if sum(other.name == run.name for other in runs) > 1}
    if twice:
        raise ParamError(f"-S {' '.join(settings)}: {min(twice)} twice; give each value once")
    return runs


def _all_folds(key: str, value: str) -> list[str]:
    """Return all folds, such as the ten of */10, and any other value as it is."""
    folds = value.removeprefix("*/")
    if key != FOLD or folds == value or not folds.isdecimal() or int(folds) < 2:
        return [value]
    return [f"{number}/{folds}" for number in range(1, int(folds) + 1)]


def _values(text: str) -> list[str]:
    """Split values at commas outside brackets and quotes."""
    found, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += (char in "[{(") - (char in "]})")
        if char == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += char
    return [value.strip() for value in found]


def _name(settings: Sequence[str], to: str) -> str:
    """Return an experiment's name, from its settings, that Git allows."""
    parts = []
    for setting in settings:
        key, _, value = setting.partition("=")
        parts += [key.rpartition(".")[2], value]
    whole = "-".join([*parts, *(["to", to] if to else [])])
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", whole).strip("-.")
    name = re.sub(r"\.\.+|\.lock$", "-", name)
    if name == whole and len(name) <= LONGEST_NAME:
        return name
    # Other values may result in the same name.
    return f"{name[:LONGEST_NAME]}-{sha256(' '.join(settings).encode()).hexdigest()[:6]}"


class Sweep:
    """The repository that runs start from, and the clones in which they run."""

    def __init__(self, to: str) -> None:
        try:
            self.root = Path(git(Path(), "rev-parse", "--show-toplevel"))
            self.commit = git(Path(), "rev-parse", "HEAD")
        except RepositoryError:
            raise SweepError("no commit here to start runs from; `git commit` first") from None
        self.below = Path.cwd().resolve().relative_to(self.root.resolve())
        self.to = [to] if to else []
        self.folder = (cache_folder() / "sweep").resolve()
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.stopped = threading.Event()
        self.threads = threads()  # for each run
        if changed := git(Path(), "status", "--porcelain", "--untracked-files=no", "."):
            first = changed.splitlines()[0][3:]
            raise SweepError(
                f"{first} is not committed, and runs start from the last commit; commit it first"
            )

    def done(self) -> set[str]:
        """Return the names of the experiments on the last commit."""
        refs = git(self.root, "for-each-ref", "--format=%(refname)", _refs_of(self.commit))
        return {ref.rpartition("/")[2] for ref in refs.splitlines()}

    def clone(self, number: int) -> Path:
        """Make a clone of the last commit for a worker; return the project's folder in it."""
        clone = self.folder / str(number)
        shutil.rmtree(clone, ignore_errors=True)  # a killed run's locks would stay
        git(self.root, "clone", "--quiet", "--shared", "--no-checkout", str(self.root), str(clone))
        git(clone, "checkout", "--quiet", "--detach", self.commit)
        project, here = clone / self.below, self.root / self.below
        # With a link, as DVC can't write a path with an umlaut to its configuration.
        of_dvc = Path(_dvc(here, "root").strip())  # of the repository, or of the project itself
        local = here / of_dvc / ".dvc" / "config.local"
        settings = local.read_text("utf-8") if local.is_file() else ""
        if "[cache]" not in settings:
            settings += f"\n[cache]\n    type = {LINKS}\n"
        (project / of_dvc / ".dvc" / "config.local").write_text(settings, "utf-8")
        cache = (here / _dvc(here, "cache", "dir").strip()).resolve()
        (project / of_dvc / ".dvc" / "cache").symlink_to(cache)
        # Files tracked by `dvc add`; outputs of stages are checked out when needed.
        added = git(clone, "ls-files", "*.dvc").splitlines()
        if added:
            _dvc(clone, "checkout", "--quiet", *added)
        return project

    def run(self, one: Planned, project: Path) -> str:
        """Run an experiment in a clone and fetch it from there; return the error, if any."""
        clone = self.folder / project.relative_to(self.folder).parts[0]
        git(clone, "reset", "--quiet", "--hard", self.commit)
        words = [word for setting in one.settings for word in ("-S", setting)]
        log = self.folder / f"{one.name}.log"
        with log.open("w", encoding="utf-8") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "dvc", "exp", "run", "--name", one.name, *words, *self.to],
                cwd=project,
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # a Ctrl-C is forwarded, once
                preexec_fn=dying_with_us(),  # noqa: PLW1509, no thread here holds a lock
            )
            self.running[one.name] = process
            code = process.wait()
            del self.running[one.name]
        refs = git(clone, "for-each-ref", "--format=%(refname)", _refs_of(self.commit))
        ours = [ref for ref in refs.splitlines() if ref.endswith(f"/{one.name}")]
        if code or not ours:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            errors = [line for line in lines if line.lower().startswith("error")]
            said = (errors or lines or ["no output"])[0]
            return f"{' '.join(said.split())[:200]} ({log})"
        git(self.root, "fetch", "--quiet", str(clone), f"{ours[0]}:{ours[0]}")
        log.unlink()
        return ""

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of runs: this Python, and one cache folder for all."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
            "PATH": path,
            "PIPELINE_CACHE": str(cache_folder().resolve()),
            "PIPELINE_THREADS": str(self.threads),
        }

    def stop(self) -> None:
        """End all runs; their resume states are kept."""
        self.stopped.set()
        for process in list(self.running.values()):
            interrupt(process)


def _dvc(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SweepError(f"dvc {' '.join(words[:2])}: {' '.join(done.stderr.split())[:200]}")
    return done.stdout


def _refs_of(commit: str) -> str:
    """Return the prefix of DVC's Git refs for the experiments on a commit."""
    return f"refs/exps/{commit[:2]}/{commit[2:]}"


def main() -> None:
    """Run from the command line."""
    parser = parser_of("sweep", __doc__ or "")
    parser.add_argument(
        "-S",
        dest="settings",
        action="append",
        required=True,
        metavar="KEY=VALUES",
        help="a param and its values, separated by commas; repeat it for all combinations",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--to", default="", metavar="STAGE", help="run the graph up to this stage")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    with one_line_errors(f"interrupted; {RECOVER}"):
        params = load_yaml(Path("params.yaml").read_text("utf-8"))
        runs = planned(options.settings, list(dict(flat(params))), options.to)
        sweep = Sweep(options.to)
        sweep.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(sweep.folder / ".lock", timeout=0):
                _all(sweep, runs, options.jobs)
        except Timeout:
            raise SweepError(f"another sweep is running in {sweep.folder}; wait for it") from None


def _all(sweep: Sweep, runs: Sequence[Planned], jobs: int) -> None:
    """Run what isn't finished, some at a time, and print the result of each."""
    done = sweep.done()
    left = [run for run in runs if run.name not in done]
    jobs = min(jobs, len(left)) or 1
    sweep.threads = max(1, threads() // jobs)
    each = f", {sweep.threads} threads each" if jobs > 1 else ""
    say(f"{len(runs)} runs, {len(runs) - len(left)} already finished; {jobs} at a time{each}")
    failed, start = [], time.perf_counter()
    for i, (run, wrong) in enumerate(
        track(_ended(sweep, left, jobs), len(left), "runs", summary=False), 1
    ):
        seconds = time.perf_counter() - start
        to_go = f", {duration(seconds / i * (len(left) - i))} left" if i < len(left) else ""
        say(f"{i} of {len(left)}  {run.name}{f'  failed: {wrong}' if wrong else ''}{to_go}")
        failed += [run.name] if wrong else []
    if failed:
        raise SweepError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed[:5])}")
    compare = "rank" if sweep.to == ["probe"] else "compare --experiments"
    say(f"run `python -m pipeline {compare}` to compare them")


def _ended(sweep: Sweep, runs: Sequence[Planned], jobs: int) -> Iterator[tuple[Planned, str]]:
    """Run in `jobs` clones at a time; yield each run as it ends, with its error."""
    free: SimpleQueue[Path] = SimpleQueue()
    for number in range(jobs if runs else 0):
        free.put(sweep.clone(number))

    def work(run: Planned) -> str:
        if sweep.stopped.is_set():
            return "not started"
        project = free.get()
        try:
            return sweep.run(run, project)
        except (RepositoryError, OSError) as error:
            return one_line(error, 200)
        finally:
            free.put(project)

    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(work, run): run for run in runs}
        try:
            while waiting:
                ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield waiting.pop(future), future.result()
        except BaseException:
            sweep.stop()
            raise
