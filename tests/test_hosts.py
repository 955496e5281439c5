"""Several hosts on one stage: each a network namespace of its own, or started by a command."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from repository import change, dvc, environment, python_path
from test_distributed import (
    alone,
    models_of,
    rows_of,
    start_of,
    wait_for_training_state,
    with_processes,
)
from torch.distributed import TCPStore
from trained import assert_losses_alike, assert_trained_alike

from pipeline.launcher import launch
from pipeline.stage_runtime.errors import SettingError
from pipeline.stage_runtime.settings import (
    cache_bytes,
    device_asked,
    hosts,
    is_elastic,
    meeting_point,
    processes,
    save_seconds,
    threads,
    world_size,
)

__all__ = ["alone"]  # the fixture

EXTRACT = ("repro", "--force", "--single-item", "extract")
MEET = "10.231.77.1"
PORT = 29411
HOSTS = {"leader": MEET, "other": "10.231.77.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[dict[str, str]]:
    """Two hosts with a cable between them; gives their namespaces."""
    names = {host: f"{host}-{os.getpid()}" for host in HOSTS}
    ends = {host: f"v{host[0]}{os.getpid()}" for host in HOSTS}
    try:
        ip("netns", "add", names["leader"])
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to make network namespaces here (root, and iproute2)")
    try:
        ip("netns", "add", names["other"])
        ip("link", "add", ends["leader"], "type", "veth", "peer", "name", ends["other"])
        for host, address in HOSTS.items():
            ip("link", "set", ends[host], "netns", names[host], "name", "cable")
            ip("-n", names[host], "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", names[host], "link", "set", device, "up")
        yield names
    finally:
        for name in names.values():
            for pid in pids(name):
                os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)


def pids(name: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def start(name: str, folder: Path, *words: str, **env: str) -> "subprocess.Popen[str]":
    """Run one of the pipeline's commands, or DVC, on a host."""
    return subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-m", *words],
        cwd=folder,
        env={
            **environment(folder),
            "PIPELINE_MEET": f"{MEET}:{PORT}",
            "PIPELINE_THREADS": "1",
            "PIPELINE_SAVE_SECONDS": "0.2",
            "PIPELINE_PATIENCE_SECONDS": "6",
            **env,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.long
@pytest.mark.parametrize("loss", ["killed", "cut off"])
def test_a_run_goes_on_without_a_host_that_is_lost(loss, alone, network, tmp_path):
    expected = shutil.copytree(alone, tmp_path / "expected")
    change(expected, "stage2.epochs", 30)
    folder = shutil.copytree(expected, tmp_path / "repo")
    dvc(expected, "repro")

    other = start(network["other"], folder, "pipeline", "join")
    running = start(network["leader"], folder, "dvc", "repro", PIPELINE_HOSTS="1:2")
    wait_for_training_state(folder)
    assert running.poll() is None
    if loss == "killed":
        for pid in pids(network["other"]):
            os.kill(pid, signal.SIGKILL)
    else:
        ip("-n", network["other"], "link", "set", "cable", "down")
    said, _ = running.communicate(timeout=240)
    assert running.returncode == 0, said
    assert "a host was lost; continuing with the remaining ones" in said
    assert "resuming at epoch" in said
    other.kill()
    for pid in pids(network["other"]):
        os.kill(pid, signal.SIGKILL)
    heard, _ = other.communicate(timeout=60)
    assert "stage2: taking part" in heard

    one, two = (rows_of(f / "models/stage2/history.csv") for f in (expected, folder))
    for column in ("epoch", "lr"):
        np.testing.assert_array_equal(two[column], one[column])
    for column in ("train_loss", "val_loss"):
        assert_losses_alike(one[column], two[column])
    weights = models_of("stage2", expected, folder)
    assert_trained_alike(start_of("stage2", expected, tmp_path), *weights)


@pytest.mark.long
@pytest.mark.long
def test_a_host_that_comes_later_takes_part_from_the_next_stage_on(alone, network, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "repo")
    change(folder, "stage2.epochs", 600)
    running = start(network["leader"], folder, "dvc", "repro", "evaluate", PIPELINE_HOSTS="1:2")
    wait_for_training_state(folder)
    other = start(network["other"], folder, "pipeline", "join")
    said, _ = running.communicate(timeout=240)
    assert running.returncode == 0, said
    for words in ("a host was lost", "going on at", "resuming at"):
        assert words not in said
    time.sleep(1)  # it says so a moment after the leader ends
    for pid in pids(network["other"]):
        os.kill(pid, signal.SIGKILL)
    heard, _ = other.communicate(timeout=60)
    assert "evaluate: taking part\nevaluate: done" in heard
    assert "stage2" not in heard
    assert len(rows_of(folder / "models/stage2/history.csv")) == 601


def test_who_joins_takes_part_in_stages_alone(tmp_path):
    """What listens there may be anybody's: it can't make this host run other modules."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    bait = {
        "run": "1",
        "attempt": 0,
        "stage": "http.server",
        "arguments": [],
        "least": 1,
        "most": 2,
    }
    meet = f"127.0.0.1:{store.port}"
    store.set(launch.OFFER, json.dumps(bait))
    joined = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "join"],
        cwd=tmp_path,
        env={**environment(tmp_path), "PYTHONPATH": python_path(ROOT), "PIPELINE_MEET": meet},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Whoever starts tests in the background has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert joined.stdout is not None
    assert joined.stdout.readline() == f"waiting for stages from {meet}\n"
    for offer in (
        json.dumps(bait),
        json.dumps({**bait, "stage": "export"}),
        "[1]",
        "{",
    ):
        store.set(launch.OFFER, offer)
        with pytest.raises(subprocess.TimeoutExpired):
            joined.wait(3)
    joined.send_signal(signal.SIGINT)
    said, _ = joined.communicate(timeout=20)
    assert said == "left; the stage continues without this host if PIPELINE_HOSTS allows it\n"


# What is asked for, and what Slurm says


@pytest.mark.parametrize(
    ("said", "found"), [("", (1, 1)), ("2", (2, 2)), ("1:4", (1, 4)), ("1", (1, 1))]
)
def test_hosts_are_a_number_or_a_range(said, found, monkeypatch):
    monkeypatch.setenv("PIPELINE_HOSTS", said)
    assert hosts() == found
    assert is_elastic() == (found == (1, 4))


@pytest.mark.parametrize(
    ("name", "said", "ask", "line"),
    [
        ("PIPELINE_HOSTS", "2:1", hosts, "expected a number such as 2, or 1:2"),
        ("PIPELINE_HOSTS", "0", hosts, "expected a number such as 2, or 1:2"),
        ("PIPELINE_HOSTS", "two", hosts, "expected a number such as 2, or 1:2"),
        ("PIPELINE_MEET", "", meeting_point, "and a free port on it, such as 10.0.0.1:29400"),
        ("PIPELINE_MEET", "host", meeting_point, "expected the address of the host that runs DVC"),
        ("PIPELINE_MEET", "host:99999", meeting_point, "expected the address of the host that"),
        ("PIPELINE_PROCESSES", "two", processes, "'two': expected a whole number >= 1"),
        ("PIPELINE_PROCESSES", "0", processes, "'0': expected a whole number >= 1"),
        ("PIPELINE_THREADS", "-1", threads, "'-1': expected a whole number >= 0"),
        ("PIPELINE_SAVE_SECONDS", "soon", save_seconds, "'soon': expected a number >= 0"),
        ("PIPELINE_CACHE_GB", "nan", cache_bytes, "'nan': expected a number >= 0"),
        ("PIPELINE_DEVICE", "gpu", device_asked, "'gpu': expected cpu, cuda or mps"),
    ],
)
def test_a_wrong_variable_is_named(name, said, ask, line, monkeypatch):
    monkeypatch.setenv(name, said)
    with pytest.raises(SettingError) as caught:
        ask()
    assert name in str(caught.value)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said", "line"),
    [
        ("PIPELINE_HOSTS", "2", "PIPELINE_MEET"),
        (
            "PIPELINE_LAUNCHER",
            "no-such-srun -n 2",
            "error: PIPELINE_LAUNCHER = 'no-such-srun -n 2': No such file",
        ),
        # Each task would be a whole stage, and write the same files.
        ("SLURM_STEP_NUM_TASKS", "8", "error: srun started 8 tasks that form no process group"),
    ],
)
def test_a_wrong_variable_ends_a_stage_in_a_line(name, said, line, repo):
    done = with_processes(repo, 1, *EXTRACT, **{name: said})
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line in error
    assert "Traceback" not in done.stderr


def test_a_batch_script_is_one_process(monkeypatch):
    job = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    monkeypatch.setattr(os, "environ", job)
    launch.refuse_lone_tasks()
    assert world_size() == 1


SRUN = """
import os, subprocess, sys
n = int(sys.argv[1])
step = dict(SLURM_JOB_ID="1", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS=str(n))
tasks = []
for i in range(n):
    own = {"SLURM_PROCID": str(i), "SLURM_NODEID": str(i)}
    tasks.append(subprocess.Popen(sys.argv[2:], env={**os.environ, **step, **own}))
sys.exit(max(abs(task.wait()) for task in tasks))
"""


@pytest.mark.long
@pytest.mark.parametrize("by", ["srun", "torchrun"])
def test_a_command_may_start_the_processes(by, alone, tmp_path):
    """Torchrun, and a stand-in for srun that starts one torchrun a host."""
    (tmp_path / "srun.py").write_text(SRUN)
    python = shlex.quote(sys.executable)
    torchrun = f"{python} -m torch.distributed.run --local-addr 127.0.0.1 --no-python"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = {
        "srun": f"{python} {tmp_path}/srun.py 2 {torchrun} --nnodes 2 --rdzv-backend c10d "
        f"--rdzv-endpoint 127.0.0.1:{port}",
        "torchrun": f"{torchrun} --standalone --nproc-per-node 2",
    }[by]
    folder = shutil.copytree(alone, tmp_path / "repo")
    shutil.rmtree(folder / ".pipeline")
    done = with_processes(folder, 1, *EXTRACT, PIPELINE_LAUNCHER=command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("extract took") == 1
    for file in sorted((alone / "data/features").glob("*.npy")):
        other = np.load(folder / "data/features" / file.name)
        np.testing.assert_allclose(other, np.load(file), rtol=1e-4, atol=1e-5)
