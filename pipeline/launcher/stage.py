"""Run a stage from the command line, in one or several processes, from its resume state."""

import inspect
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_type_hints

from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.launcher.launch import SHARED, is_shared, launch, refuse_lone_tasks
from pipeline.launcher.supervise import INTERRUPTED, LAUNCHED, be_interruptible, stage_lock
from pipeline.stage_runtime.distributed import broadcast, process_group
from pipeline.stage_runtime.errors import RECOVER
from pipeline.stage_runtime.files import write_json
from pipeline.stage_runtime.progress import duration, say
from pipeline.stage_runtime.resume import Resume, held_resume
from pipeline.stage_runtime.schema import (
    Out,
    Stage,
    arguments,
    path_names,
    read_params,
    sources,
)
from pipeline.stage_runtime.settings import cache_folder, rank, world_size


def main(stage: Stage) -> None:
    """Run a stage from the command line; a user error is printed as one line.

    What the stage returns is written to its `--timing` file, with the total seconds that it took.
    Set PIPELINE_DEBUG=1 to see the traceback of an error.
    """
    about = f"{inspect.getdoc(stage)}\n\n`dvc repro {stage.__name__}` runs it as set in dvc.yaml."
    parser = parser_of(stage.__name__, about)
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), help="(default: %(default)s)"
    )
    parser.add_argument("--timing", type=Path, required=True, help="written: its run time")
    hints = get_type_hints(stage, include_extras=True)
    for name in path_names(stage):
        what = "written" if hints[name] == Out else "read"
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, required=True, help=what)
    options = vars(parser.parse_args())
    params, timing = options.pop("params"), options.pop("timing")
    with one_line_errors(INTERRUPTED, RECOVER):
        be_interruptible()
        refuse_lone_tasks()
        chosen = arguments(stage, read_params(params))
        launched = LAUNCHED in os.environ  # by a parent process, which handles the next two
        one_at_a_time = not launched and rank() == 0
        spread_out = not launched and world_size() == 1 and stage.__name__ in SHARED and is_shared()
        with stage_lock(stage.__name__) if one_at_a_time else nullcontext():
            if spread_out:
                sys.exit(launch(stage.__name__, sys.argv[1:]))
            with process_group() if world_size() > 1 else nullcontext():
                _run(stage, options, chosen, timing)


def _run(stage: Stage, paths: dict[str, Path], params: dict[str, Any], timing: Path) -> None:
    """Run a stage, or restore its outputs if another run finished it."""
    name, hints = stage.__name__, get_type_hints(stage, include_extras=True)
    inputs = [path for n, path in paths.items() if hints[n] is Path]
    with held_resume(name, {**paths, **params}, inputs, sources(stage, params)) as resume:
        if broadcast(rank() == 0 and resume.put_back()):
            say(f"{name} had finished, but DVC had not recorded it: its outputs are restored")
        else:
            _compute(stage, paths, params, timing, resume)


def _compute(
    stage: Stage, paths: dict[str, Path], params: dict[str, Any], timing: Path, resume: Resume
) -> None:
    """Run a stage from its resume state, and keep its outputs until DVC has recorded them."""
    started, start = time.time(), time.perf_counter()
    name, hints = stage.__name__, get_type_hints(stage, include_extras=True)
    resumes = {n: resume for n, hint in hints.items() if hint is Resume}
    if rank() > 0:  # computes its part; the first process writes the outputs
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            outs = {n: Path(scratch, n) for n in paths if hints[n] == Out}
            stage(**{**paths, **outs}, **params, **resumes)
        return
    rates = {"seconds": 0.0, **stage(**paths, **params, **resumes)}
    rates["seconds"] = time.perf_counter() - start
    write_json(timing, {name: {k: round(v, 3) for k, v in rates.items()}})
    resume.keep([paths[n] for n in paths if hints[n] == Out], timing, started)
    say(f"{name} took {duration(rates['seconds'])}")
