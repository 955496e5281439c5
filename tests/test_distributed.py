"""Several processes on one stage: the same experiment, whoever does which part of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL, Run
from repository import change, dvc, environment, hashes, python_path
from safetensors.numpy import load_file
from test_graph import stages_run
from trained import FAR, assert_losses_alike, assert_trained_alike, start_of_stage1

from bench.same import apart_of

TOGETHER = """
import sys
import numpy as np, torch
from torch import nn
from pipeline.stage_runtime.settings import rank, world_size
from pipeline.stage_runtime.distributed import (
    all_gather_batches, all_reduce_gradients, broadcast, process_group, shard
)

with process_group():
    assert broadcast(f"from {rank()}") == "from 0"
    for n in (1, 2, 5):
        made = lambda i: [np.full((2, 3), i, np.float32), np.arange(i, i + 4)]
        found = list(all_gather_batches(n, made))
        assert len(found) == n
        for i, (first, second) in enumerate(found):
            assert first.dtype == np.float32 and (first == i).all() and first.shape == (2, 3)
            assert second.tolist() == [i, i + 1, i + 2, i + 3]
    rows = np.arange(7)
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    whole = nn.ModuleList([model, frozen])
    x = torch.randn(7, 3, 8, 8)
    model(x).square().mean(dim=(1, 2, 3)).mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    own = shard(rows)
    loss = model(x[own]).square().mean(dim=(1, 2, 3)).sum() / len(rows)
    loss.backward()
    layout = model.weight.grad.stride()
    [total, number] = all_reduce_gradients(whole, loss.item(), len(own))
    assert number == 7
    for p, e in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, e, rtol=1e-5, atol=1e-7)
    assert model.weight.grad.stride() == layout
    assert all(p.grad is None for p in frozen.parameters())
print("fine", flush=True)
"""

FITTED = """
import json
import sys
import numpy as np, torch
from contextlib import nullcontext
from torch import nn
from pipeline.training.fit import Recipe, fit
from pipeline.stage_runtime.settings import rank, world_size
from pipeline.stage_runtime.distributed import process_group

torch.manual_seed(0)
layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
model = nn.Sequential(*layers)
before = [p.detach().clone() for p in model.parameters()]
x, labels = torch.randn(6, 3, 8, 8), np.arange(6) % 2
recipe = Recipe(3, 2, "sgd", 0.1, 1.0, 0.0, 0.9, "constant", 0, 7, 0.1, 0.0, 0.0)
with process_group() if world_size() > 1 else nullcontext():
    run = fit(model, model, lambda _, rows: x[rows], labels, np.ones(6), recipe, seed=0)
    epochs = [[epoch.loss, epoch.accuracy] for epoch in run]
if rank() == 0:
    print(json.dumps([epochs, [p.detach().flatten().tolist() for p in model.parameters()]]))
    print(json.dumps([p.flatten().tolist() for p in before]))
"""


def launched(script: Path, n: int) -> str:
    """Run a script in several processes, or alone; gives what they say."""
    words = ["--nproc-per-node", str(n), "--standalone", "--local-addr", "127.0.0.1"]
    launcher = ["-m", "torch.distributed.run", *words] if n > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        env={**os.environ, "PYTHONPATH": python_path(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("n", [2, 3])
def test_what_processes_do_together_is_what_one_would_do(n, tmp_path):
    (tmp_path / "together.py").write_text(TOGETHER)
    assert launched(tmp_path / "together.py", n).count("fine") == n


@pytest.mark.long
def test_a_batch_smaller_than_the_number_of_processes_trains_as_one_process_does(tmp_path):
    (tmp_path / "fitted.py").write_text(FITTED)
    found = [launched(tmp_path / "fitted.py", n).splitlines()[-2:] for n in (1, 3)]
    (one, start), (three, _) = ([json.loads(line) for line in lines] for lines in found)
    np.testing.assert_allclose(three[0], one[0], rtol=1e-5)
    for expected, actual, drawn in zip(one[1], three[1], start, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
        assert np.abs(np.subtract(expected, drawn)).max() > 1e-2  # it moved


def with_processes(
    folder: Path, n: int, *words: str, **env: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=folder,
        env={**environment(folder), "PIPELINE_PROCESSES": str(n), **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(first: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process in float32, whose rounding is the only difference that is left."""
    folder = shutil.copytree(first.folder, tmp_path_factory.mktemp("alone") / "repo")
    change(folder, "precision", "fp32")
    for stage, values in FAR.items():
        for key, value in values.items():
            change(folder, f"{stage}.{key}", value)
    dvc(folder, "repro")
    return folder


@pytest.fixture(scope="module")
def shared(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two processes, from nothing."""
    folder = shutil.copytree(alone, tmp_path_factory.mktemp("shared") / "repo")
    shutil.rmtree(folder / ".pipeline")
    done = with_processes(folder, 2, "repro", "--force")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def rows_of(file: Path) -> np.ndarray:
    return np.genfromtxt(file, delimiter=",", names=True, dtype=float)


@pytest.mark.long
def test_two_processes_compute_the_codes_of_one(alone, shared):
    files = sorted((alone / "data/features").glob("*.npy"))
    assert len(files) > 10
    for file in files:
        other = np.load(shared / "data/features" / file.name)
        np.testing.assert_allclose(other, np.load(file), rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_processes_train_as_one_does(stage, alone, shared, tmp_path):
    one, two = (rows_of(f / f"models/{stage}/history.csv") for f in (alone, shared))
    for column in ("epoch", "lr"):
        np.testing.assert_array_equal(two[column], one[column])
    for column in ("train_loss", "val_loss"):
        assert_losses_alike(one[column], two[column])
    assert_trained_alike(start_of(stage, alone, tmp_path), *models_of(stage, alone, shared))


def start_of(stage: str, folder: Path, scratch: Path) -> dict[str, np.ndarray]:
    """Give the weights that a stage of a repository's run started from."""
    if stage == "stage2":
        return load_file(folder / "models/stage1/model.safetensors")
    probe = folder / "models/probe/probe.safetensors"
    return start_of_stage1(folder / "data/prepared", probe, SMALL["stage1"]["image_size"], scratch)


def models_of(stage: str, *folders: Path) -> list[dict[str, np.ndarray]]:
    return [load_file(folder / f"models/{stage}/model.safetensors") for folder in folders]


def test_weights_that_stayed_or_went_another_way_do_not_count_as_trained_alike():
    random = np.random.default_rng(0)
    start = {"a": random.normal(size=(9, 9)), "b": random.normal(size=9)}
    moved = {name: w + 0.01 * random.normal(size=w.shape) for name, w in start.items()}
    near = {name: w + 1e-6 * random.normal(size=w.shape) for name, w in moved.items()}
    assert_trained_alike(start, moved, near)
    assert apart_of(start, moved, near) < 1e-3
    assert apart_of(start, moved, start) == 1
    assert apart_of(start, start, start) == float("inf")
    for one, two in (
        (start, start),
        (start, moved),
        (moved, start),
        (moved, {**moved, "b": start["b"]}),
    ):
        with pytest.raises(AssertionError):
            assert_trained_alike(start, one, two)
    assert_losses_alike(np.array([np.nan, 1.0, 0.5]), np.array([np.nan, 1.0, 0.501]))
    for other in ([np.nan, 1.0, 0.51], [np.nan, np.nan, 0.5]):
        with pytest.raises(AssertionError):
            assert_losses_alike(np.array([np.nan, 1.0, 0.5]), np.array(other))
    with pytest.raises(AssertionError, match="stayed"):
        assert_losses_alike(np.ones(3), np.ones(3))


@pytest.mark.long
def test_two_processes_count_every_image_once(alone, shared):
    one, two = (
        json.loads((f / "models/report/metrics.json").read_text())["test"] for f in (alone, shared)
    )
    assert {m: v["accuracy"] for m, v in one.items()} == {m: v["accuracy"] for m, v in two.items()}


@pytest.mark.long
def test_the_number_of_processes_reruns_nothing(shared):
    for n in (1, 2):
        assert stages_run(with_processes(shared, n, "repro").stdout) == []


@pytest.mark.long
def test_two_processes_repeat_to_the_bit(shared, tmp_path):
    folder = shutil.copytree(shared, tmp_path / "repo")
    shutil.rmtree(folder / ".pipeline")
    assert with_processes(folder, 2, "repro", "--force").returncode == 0
    assert hashes(folder) == hashes(shared)


@pytest.mark.long
def test_statistics_of_parts_of_a_batch_are_refused(repo):
    change(repo, "stage2.batchnorm", "train")
    done = with_processes(repo, 2, "repro", "stage2")
    assert done.returncode != 0
    line = "error: params.yaml: stage2.batchnorm = 'train' (or weights from scratch) with several"
    assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_param_is_told_once(repo):
    change(repo, "stage2.lr", -1.0)
    done = with_processes(repo, 2, "repro", "stage2")
    assert done.returncode != 0
    assert done.stderr.count("error: params.yaml: stage2.lr = -1.0") == 1


def wait_for_training_state(folder: Path) -> None:
    """Wait until stage 2 has saved its state for the first time."""
    states = folder / ".pipeline/resume"
    end = time.monotonic() + 120
    while time.monotonic() < end and not list(states.glob("stage2-*/training.safetensors")):
        time.sleep(0.05)


def workers(folder: Path) -> dict[int, int]:
    """Find the processes that share a stage in a folder: their ranks, by process."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "cwd").resolve() == folder:
                env = (process / "environ").read_bytes().decode(errors="replace")
                if rank := re.search(r"(?:^|\0)RANK=(\d+)", env):
                    found[int(process.name)] = int(rank[1])
        except OSError:
            continue
    return found


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_and_the_stage_goes_on(victim, shared, tmp_path):
    folder = shutil.copytree(shared, tmp_path / "repo").resolve()
    change(folder, "stage2.epochs", 30)
    expected = shutil.copytree(folder, tmp_path / "expected")
    env = {"PIPELINE_SAVE_SECONDS": "0.2"}
    assert with_processes(expected, 2, "repro", **env).returncode == 0
    running = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=folder,
        env={**environment(folder), "PIPELINE_PROCESSES": "2", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_training_state(folder)
    killed = [pid for pid, rank in workers(folder).items() if rank == victim]
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    said, _ = running.communicate(timeout=60)
    assert running.returncode != 0
    assert not workers(folder)
    done = with_processes(folder, 2, "repro", **env)
    assert done.returncode == 0, said + done.stdout + done.stderr
    assert "resuming at epoch" in done.stdout
    assert hashes(folder) == hashes(expected)
