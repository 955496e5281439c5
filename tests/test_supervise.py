"""No stage is left behind by who started it, none runs twice, and its end is told in a line."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from repository import python_path

# A stage that sleeps, or does what its argument says.
STAGE = """
import os, sys, time
from pathlib import Path
from pipeline.launcher.supervise import supervised
from pipeline.stage_runtime.schema import Out

def sleeper(*, out: Out, seconds: int) -> dict[str, float]:
    Path("child").write_text(str(os.getpid()))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    out.mkdir(exist_ok=True)
    (out / "done").touch()
    {extra}
    return {{}}

supervised("sleeper")
from pipeline.launcher.stage import main
main(sleeper)
"""


@pytest.fixture(params=["Linux", pytest.param("elsewhere", marks=pytest.mark.long)])
def start(request, tmp_path, monkeypatch):
    """Start the stage in a folder of its own; what is left of it at the end is ended."""
    started, elsewhere = [], request.param == "elsewhere"

    def begin(seconds: int = 60, extra: str = "", **env: str) -> "subprocess.Popen[str]":
        (tmp_path / "sleeper.py").write_text(STAGE.format(extra=extra))
        (tmp_path / "params.yaml").write_text(f"sleeper: {{seconds: {seconds}}}")
        (tmp_path / "child").unlink(missing_ok=True)
        words = [sys.executable, "sleeper.py", "--out", "out", "--timing", "timing.json"]
        here = str(ROOT / "tests" / "elsewhere") if elsewhere else ""
        env = {**os.environ, "PYTHONPATH": python_path(ROOT, here), **env}
        started.append(
            subprocess.Popen(
                words, cwd=tmp_path, env=env, text=True, stderr=subprocess.PIPE, stdout=-1
            )
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def child(folder: Path) -> int:
    """Wait until the stage works, and give the process that does."""
    for _ in range(1000):
        if (folder / "child").exists() and (text := (folder / "child").read_text()):
            return int(text)
        time.sleep(0.01)
    raise AssertionError("the stage didn't start")


def ends(pid: int, seconds: float = 5) -> bool:
    """Tell whether a process is gone, at the latest after so long."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        try:
            if ") Z" in Path(f"/proc/{pid}/stat").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_a_stage_ends_as_its_work_does(start, tmp_path):
    process = start(seconds=0)
    assert process.wait() == 0
    assert (tmp_path / "out" / "done").exists()
    assert (tmp_path / "timing.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_who_is_asked_to_end_does_and_says_how_to_go_on(number, start, tmp_path):
    process = start()
    working = child(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert said == "interrupted; run the same command to resume\n"
    assert process.returncode == 1
    assert ends(working)


def test_a_stage_dies_with_its_parent(start, tmp_path):
    process = start()
    working = child(tmp_path)
    process.kill()
    assert ends(working)


def test_what_the_system_kills_is_said_in_a_line(start, tmp_path):
    process = start()
    os.kill(child(tmp_path), signal.SIGKILL)
    _, said = process.communicate(timeout=10)
    assert said.startswith("error: sleeper was killed by SIGKILL, which the system sends when mem")
    assert said.endswith("dvc checkout` restores the earlier outputs\n")
    assert said.count("\n") == 1
    assert process.returncode == 137


def test_memory_that_is_refused_is_said_in_a_line(start):
    process = start(seconds=0, extra="bytes(1 << 60)")
    _, said = process.communicate(timeout=10)
    assert said.startswith("error: out of memory; use smaller images or batches; run the same")
    assert (said.count("\n"), process.returncode) == (1, 1)


def test_a_second_one_in_the_same_folder_is_refused_and_names_the_first(start, tmp_path):
    start()
    working = child(tmp_path)
    second = start()
    _, said = second.communicate(timeout=30)
    assert said == (
        f"error: sleeper is already running in this folder (process {working}); wait for it, or "
        "end it with kill\n"
    )


def test_the_lock_of_a_killed_stage_holds_nobody_up(start, tmp_path):
    first = start()
    child(tmp_path)
    first.kill()
    start(seconds=0)
    assert first.wait() == -signal.SIGKILL
    again = start(seconds=0)
    assert again.wait(timeout=20) == 0


def test_a_stage_ends_when_dvc_behind_a_shell_is_killed(start, tmp_path):
    """As DVC starts it: through a shell, which may well outlive DVC."""
    dvc = """
import os, shlex, subprocess, sys, time
env = {**os.environ, "DVC_STAGE": "sleeper"}
command = f"{shlex.quote(sys.executable)} sleeper.py --out out --timing timing.json; true"
subprocess.run(["/bin/sh", "-c", command], env=env)
"""
    start().kill()  # for its files alone
    (tmp_path / "child").unlink(missing_ok=True)
    env = {**os.environ, "PYTHONPATH": python_path(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", dvc], cwd=tmp_path, env=env)
    try:
        working = child(tmp_path)
    finally:
        process.kill()
        process.wait()
    assert ends(working)


def test_a_stage_that_nobody_but_a_shell_started_outlives_it(start, tmp_path):
    """`nohup python -m pipeline stage1 ... &` is meant to."""
    start().kill()
    (tmp_path / "child").unlink(missing_ok=True)
    words = (
        f"{shlex.quote(sys.executable)} sleeper.py --out out --timing timing.json >/dev/null 2>&1 &"
    )
    env = {**os.environ, "PYTHONPATH": python_path(ROOT)}
    env.pop("DVC_STAGE", None)
    subprocess.run(["/bin/sh", "-c", words], cwd=tmp_path, env=env, check=True)
    working = child(tmp_path)
    try:
        assert not ends(working, 1.5)
    finally:
        os.kill(working, signal.SIGKILL)


@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.0])
def test_who_interrupts_a_command_that_still_imports_sees_no_traceback(seconds, tmp_path):
    words = [sys.executable, "-m", "pipeline", "predict", str(tmp_path)]
    started = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode != 0
    assert "Traceback" not in said


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="this Python has the packages itself")
def test_a_python_without_the_packages_goes_on_in_the_projects_environment(tmp_path):
    """As `.venv/bin/dvc repro` starts stages where no environment is active."""
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=lambda *_: {"__pycache__"})
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    bare = Path(sys.base_prefix) / "bin" / "python3"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = ["-m", "pipeline", "params", "stage2.lr"]
    asked = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([bare, *words], **asked, check=True)
    assert done.stdout.startswith("stage2.lr: 5e-05\n")
    done = subprocess.run([bare, "-S", *words], **asked, check=False)  # and so again there
    line = f"error: filelock is not installed in {sys.base_prefix}; run `make install`\n"
    assert done.stderr == line
    (tmp_path / ".venv").unlink()
    done = subprocess.run([bare, *words], **asked, check=False)
    assert done.stderr == line
