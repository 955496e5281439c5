"""Small images, small params and the stages run on them; shared by all tests."""

import atexit
import os
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

os.environ.setdefault("PIPELINE_THREADS", "2")

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

from pipeline.advise import advise
from pipeline.evaluate import evaluate
from pipeline.extract import extract
from pipeline.nets.backbone import pretrained
from pipeline.prepare import prepare
from pipeline.probe import probe
from pipeline.stage import Stage, arguments
from pipeline.stage1 import stage1
from pipeline.stage2 import stage2

ROOT = Path(__file__).parent.parent
TINY = "timm/test_efficientnet"  # 0.4 million weights, drawn once and kept as a file

SMALL = {
    "backbone": {"name": TINY},
    "prepare": {"source": "folder", "size": 64, "test_fraction": 0.25, "val_fraction": 0.25},
    "extract": {"image_size": 64, "views": 1},
    "probe": {"linear_c": [0.01, 1.0], "svm_linear_c": [0.01], "svm_rbf_c": [1.0], "folds": 2},
    "stage1": {"unfreeze": ["blocks.4"], "image_size": 64, "epochs": 2, "views": 2},
    "stage2": {"image_size": 64, "epochs": 2},
    "evaluate": {"views": 2},
    "flips": "horizontal",
}


def write_photos(folder: Path, classes: int = 2, each: int = 16, grey: bool = False) -> Path:
    """Write noisy pictures whose classes differ in the direction of their stripes."""
    for label in range(classes):
        for i in range(each):
            file = folder / f"class{label}" / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            random = np.random.default_rng([label, i])
            y, x = np.mgrid[:48, :56] / 4
            angle = np.pi * label / classes
            stripes = np.sin(x * np.cos(angle) + y * np.sin(angle))[..., None]
            pixels = 128 + 60 * stripes + random.normal(0, 25, (48, 56, 1 if grey else 3))
            pixels = pixels.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels[..., 0] if grey else pixels).save(file)
    return folder


@cache
def tiny_weights() -> dict[str, str]:
    """Draw weights for the tiny network, which count as pretrained: what a file gives."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    file = Path(folder.name) / "tiny.safetensors"
    model, _ = pretrained(TINY, "none", "", seed=0)
    save_file(model.state_dict(), file)
    return {"weights": str(file), "sha256": sha256(file.read_bytes()).hexdigest()}


def read_params(**sections: dict[str, Any]) -> dict[str, Any]:
    """Read the project's params.yaml made small, then changed by `section={key: value}`."""
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    other = {"weights", "name"} & set(sections.get("backbone", {}))
    weights = {"weights": "none", "sha256": ""} if other else tiny_weights()
    for changes in (SMALL, {"backbone": weights}, sections):
        for section, values in changes.items():
            if isinstance(values, dict):
                assert set(values) <= set(params[section]), f"unknown keys in {values}"
                params[section].update(values)
            else:
                params[section] = values
    return params


def paths(folder: Path) -> dict[str, dict[str, Path]]:
    """Name every stage's inputs and outputs below one folder, as dvc.yaml does."""
    prepared, features, models = folder / "prepared", folder / "features", folder / "models"
    probes = models / "probe" / "probe.safetensors"
    first, second = (models / f"stage{i}" / "model.safetensors" for i in (1, 2))
    return {
        "prepare": {"out": prepared},
        "extract": {"prepared": prepared, "out": features},
        "probe": {"features": features, "out": models / "probe"},
        "advise": {
            "prepared": prepared,
            "features": features,
            "probe": probes,
            "grid": models / "probe" / "grid.csv",
            "scores": models / "probe" / "metrics.json",
            "out": models / "advice",
        },
        "stage1": {"prepared": prepared, "probe": probes, "out": models / "stage1"},
        "stage2": {"prepared": prepared, "stage1": first, "out": models / "stage2"},
        "evaluate": {
            "prepared": prepared,
            "features": features,
            "probe": probes,
            "advice": models / "advice" / "advice.json",
            "stage1": first,
            "stage2": second,
            "out": models / "report",
            "final": models / "final",
        },
    }


STAGES: dict[str, Stage] = {
    stage.__name__: stage for stage in (prepare, extract, probe, advise, stage1, stage2, evaluate)
}


def run(folder: Path, params: dict[str, Any], *names: str) -> None:
    """Run the named stages, or all, with the given params and everything below one folder."""
    for name in names or STAGES:
        STAGES[name](**paths(folder)[name], **arguments(STAGES[name], params))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of sixteen colour images."""
    return write_photos(tmp_path / "photos")


@pytest.fixture(autouse=True)
def cache_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep trunk outputs out of the project's folder."""
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole small run that tests may read, not change: see `paths` for what lies where."""
    folder = tmp_path_factory.mktemp("finished")
    write_photos(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELINE_CACHE", str(folder / "cache"))
        run(folder, read_params(prepare={"path": str(folder / "photos")}))
    return folder
