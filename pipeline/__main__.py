"""Stages and commands: `python -m pipeline NAME ...`, each with `--help`.

The graph, which `dvc repro` runs:

    prepare     list, audit, split, decode once, pack as uint8
    extract     CNN codes at several depths of the frozen, pretrained network
    probe       linear and SVM classifiers on the codes, chosen by cross-validation
    advise      expected gain and expected run time of fine-tuning
    stage1      a new head and the top layers; the rest frozen
    stage2      the full network at a tiny learning rate
    evaluate    all models on the test split, once; the final model
    report      one page with the results of all stages

Commands:

    predict       label new images with the final model
    export        write the final model as ONNX
    compare       compare runs: which differences are more than noise
    rank          rank the backbones of runs by their probes
    sweep         run the graph for every combination of param values
    params        what each param does, and its allowed values
    networks      the architectures that can be a backbone, and why others can not
    layers        the modules of a network that params can name
    explain       which stages would run, and why
    machine       which devices this machine has, whether they compute correctly, how fast they are
    merge         finish a merge of branches: rebuild the files that the graph wrote
    cache         find damaged files in DVC's cache
    join          take part in the stages that another host runs
    plots         write the page that `dvc plots` fills
    dependencies  write the source files that each stage imports into dvc.yaml
"""

import os
import signal
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
RESTARTED = "PIPELINE_RESTARTED"  # in the environment, once the project's own Python was taken
NEEDED = ("filelock", "psutil", "pydantic", "rich", "torch")  # of what the project installs


def main() -> None:
    """Run the stage or command that the first argument names."""
    _use_own_environment()
    # Threads that wait should sleep, not spin, where another program wants the same processors. It
    # changes no result, and has to be set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ctrl-C while libraries are imported ends without a traceback; what has begun says how to go
    # on. A shell may have it ignored in the background: then it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    known = {line.split()[0]: line for line in (__doc__ or "").splitlines() if line[:4] == "    "}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "-h", "--help"):
        from pipeline.launcher.command import one_line_errors

        with one_line_errors():
            print((__doc__ or "").rstrip())
        return
    if name not in known:
        from pipeline.stage_runtime.errors import suggest

        sys.exit(f"error: no stage or command is called {name!r}; {suggest(name, known)}")
    del sys.argv[1]
    if not (HERE / f"{name}.py").exists():
        _show_on_terminal()
        room = "commands" if (HERE / "commands" / f"{name}.py").exists() else "launcher"
        import_module(f"pipeline.{room}.{name}").main()
        return
    from pipeline.launcher.supervise import supervised

    supervised(name)  # before the stage's libraries are imported: its parent needs none
    from pipeline.launcher.stage import main as run

    _show_on_terminal()
    run(getattr(import_module(f"pipeline.{name}"), name))


def _show_on_terminal() -> None:
    from pipeline.launcher.terminal import Terminal
    from pipeline.stage_runtime.progress import show_on

    show_on(Terminal())


def _use_own_environment() -> None:
    """Start again in the project's environment where this Python lacks the packages."""
    missing = [name for name in NEEDED if not find_spec(name)]
    if not missing:
        os.environ.pop(RESTARTED, None)
        return
    own = HERE.parent / ".venv"
    python = own / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    tried = RESTARTED in os.environ or Path(sys.prefix).resolve() == own.resolve()
    if tried or not python.exists():
        sys.exit(f"error: {missing[0]} is not installed in {sys.prefix}; run `make install`")
    os.environ[RESTARTED] = "1"
    os.execv(python, [str(python), *sys.orig_argv[1:]])  # noqa: S606


if __name__ == "__main__":
    main()
