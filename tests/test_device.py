"""Networks on another device than the processor: a GPU where there is one, and one made up."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, read_params, run, write_photos
from second_device import DEVICE, second_device
from test_distributed import models_of, rows_of
from torch.optim import optimizer as optimizers
from trained import FAR, assert_losses_alike, assert_trained_alike, start_of_stage1

from pipeline.nets import device as devices
from pipeline.nets import device_images as feed
from pipeline.stage_runtime.errors import SettingError
from pipeline.training import trunk_cache as stored

AFTER = ("extract", "probe", "advise", "stage1", "stage2", "evaluate", "report")
# Room for nothing, and for all: images and trunk outputs stay on the processor, or don't.
ROOMS = {"sent in batches": False, "kept there": True}


def small(folder: Path) -> dict[str, Any]:
    changes = {"augment": {"crop": 0.7, "light": 0.1}, "flips": "dihedral", "precision": "fp32"}
    changes["prepare"] = {"path": str(folder / "photos"), "size": 96}
    return read_params(**changes, **FAR, evaluate={"views": 2})


@pytest.fixture(scope="module")
def on_the_processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run there, in float32."""
    folder = tmp_path_factory.mktemp("processor")
    write_photos(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELINE_CACHE", str(folder / "cache"))
        patch.setenv("PIPELINE_DEVICE", "cpu")
        run(folder, small(folder))
    return folder


def run_there(processor: Path, folder: Path) -> None:
    """Run all stages after prepare on what the processor's run prepared."""
    shutil.copytree(processor / "prepared", folder / "prepared")
    run(folder, small(processor), *AFTER)


def agree(one: Path, two: Path, off: float, scratch: Path) -> None:
    """Refuse a run whose codes, losses or weights are others than rounding makes them."""
    for file in sorted((one / "features").glob("*.npy")):
        other = np.load(two / "features" / file.name)
        np.testing.assert_allclose(other, np.load(file), rtol=off, atol=off, err_msg=file.name)
    for stage in ("stage1", "stage2"):
        histories = [rows_of(f / f"models/{stage}/history.csv") for f in (one, two)]
        for column in ("train_loss", "val_loss"):
            assert_losses_alike(*(history[column] for history in histories))
        assert_trained_alike(start_of(stage, one, scratch), *models_of(stage, one, two))


def start_of(stage: str, run: Path, scratch: Path) -> dict[str, Any]:
    """Give the weights that a stage started from."""
    if stage == "stage2":
        return models_of("stage1", run)[0]
    probe = run / "models/probe/probe.safetensors"
    return start_of_stage1(run / "prepared", probe, SMALL["stage1"]["image_size"], scratch)


@pytest.fixture(params=[pytest.param("sent in batches", marks=pytest.mark.long), "kept there"])
def second(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The made-up device as the one that networks run on, with room or without."""
    original = devices.device
    for name, module in list(sys.modules.items()):
        if name.startswith("pipeline.") and getattr(module, "device", None) is original:
            monkeypatch.setattr(module, "device", lambda: DEVICE)
    for module in (feed, stored):
        monkeypatch.setattr(module, "has_room", lambda *asked: ROOMS[request.param])
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    with second_device():
        yield request.param


def test_all_stages_run_on_another_device_and_agree(second, on_the_processor, tmp_path):
    run_there(on_the_processor, tmp_path)
    agree(on_the_processor, tmp_path, 1e-4, tmp_path)


def test_runs_that_trained_nothing_do_not_agree(on_the_processor, tmp_path, monkeypatch):
    """Not even with themselves: else the tests of other devices would pass without a step."""
    for name in ("prepared", "features", "models"):
        shutil.copytree(on_the_processor / name, tmp_path / name)
    agree(tmp_path, tmp_path, 1e-4, tmp_path)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    run(tmp_path, small(on_the_processor), "stage1", "stage2")
    with pytest.raises(AssertionError, match="the loss stayed where it was"):
        agree(tmp_path, tmp_path, 1e-4, tmp_path)
    for stage in ("stage1", "stage2"):
        weights = models_of(stage, tmp_path, tmp_path)
        with pytest.raises(AssertionError, match="nothing was trained"):
            assert_trained_alike(start_of(stage, tmp_path, tmp_path), *weights)


def test_a_gpu_that_is_asked_for_and_not_there_is_told(monkeypatch):
    monkeypatch.setenv("PIPELINE_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingError, match=r"PIPELINE_DEVICE = 'cuda': PyTorch \S+ (is|finds) "):
        devices.device()
    monkeypatch.setenv("PIPELINE_DEVICE", "")
    assert devices.device() == torch.device("cpu")


def test_each_process_has_a_gpu_of_its_own_or_there_are_too_few(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for place in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(place))
        assert devices.device() == torch.device("cuda", place)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        SettingError, match=r"more processes than GPUs here \(2\); start one per GPU"
    ):
        devices.device()
    monkeypatch.setenv("PIPELINE_DEVICE", "cpu")
    assert devices.device() == torch.device("cpu")


# Where there is a GPU

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=devices.no_gpu())


@needs_a_gpu
def test_a_gpu_agrees_with_the_processor(on_the_processor, tmp_path, monkeypatch):
    monkeypatch.setenv("PIPELINE_DEVICE", "cuda")
    run_there(on_the_processor, tmp_path)
    agree(on_the_processor, tmp_path, 1e-3, tmp_path)


@needs_a_gpu
def test_a_gpu_repeats_to_the_bit(on_the_processor, tmp_path, monkeypatch):
    monkeypatch.setenv("PIPELINE_DEVICE", "cuda")
    for name in ("one", "two"):
        monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / name / "cache"))
        run_there(on_the_processor, tmp_path / name)
    for file in ("models/stage1/model.safetensors", "models/stage2/model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@needs_a_gpu
def test_a_gpu_keeps_images_that_fit():
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    batches = feed.DeviceImages(images, torch.device("cuda"))
    rows = np.array([39, 0, 7, 7])
    assert batches(rows).is_cuda
    assert torch.equal(batches(rows).cpu(), torch.from_numpy(images[rows]))
