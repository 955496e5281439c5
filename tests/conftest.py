"""Small images, small params and the stages run on them; shared by all tests."""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from getpass import getuser
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

# Tests beside others leave them a core, whatever the process that started them was told.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ |= {"PIPELINE_THREADS": "1", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("PIPELINE_THREADS", "2")

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image
from repository import commit, dvc, new_repository
from safetensors.torch import save

from pipeline.advise import advise
from pipeline.evaluate import evaluate
from pipeline.extract import extract
from pipeline.nets.backbone import pretrained
from pipeline.prepare import prepare
from pipeline.probe import probe
from pipeline.report import report
from pipeline.stage1 import stage1
from pipeline.stage2 import stage2
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import Stage, arguments

ROOT = Path(__file__).parent.parent
PHOTOS = "photos"  # of the repositories that tests run DVC in: in Git, so that a clone has them
TINY = "timm/test_efficientnet"  # 0.4 million weights, drawn once and kept as a file

# oneDNN's bfloat16 needs AVX-512 (or AMX); a processor without computes in float32.
needs_bf16 = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    reason="this processor can't compute in bfloat16",
)
FORMATS = ["fp32", pytest.param("bf16", marks=needs_bf16)]

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


def write_photos(
    folder: Path, classes: int = 2, each: int = 16, grey: bool = False, first: int = 0
) -> Path:
    """Write noisy pictures, drawn from the `first` on, whose classes differ in their stripes."""
    for label in range(classes):
        for i in range(each):
            file = folder / f"class{label}" / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            random = np.random.default_rng([label, first + i])
            y, x = np.mgrid[:48, :56] / 4
            angle = np.pi * label / classes
            stripes = np.sin(x * np.cos(angle) + y * np.sin(angle))[..., None]
            pixels = 128 + 60 * stripes + random.normal(0, 25, (48, 56, 1 if grey else 3))
            pixels = pixels.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels[..., 0] if grey else pixels).save(file)
    return folder


@cache
def tiny_weights() -> dict[str, str]:
    """Draw weights for the tiny network, which count as pretrained: what a file gives.

    In one place for all of pytest's processes, as artifacts and pages name it.
    """
    model, _ = pretrained(TINY, "none", "", seed=0)
    content = save(model.state_dict())
    folder = Path(tempfile.gettempdir()) / f"two-stage-finetuning-{getuser()}"
    folder.mkdir(exist_ok=True)
    file = folder / "tiny.safetensors"
    if not file.exists() or file.read_bytes() != content:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            part.write(content)
        Path(part.name).replace(file)
    return {"weights": str(file), "sha256": sha256(content).hexdigest()}


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
        "report": {
            "prepared": prepared,
            "probe": probes,
            "out_of_fold": models / "probe" / "out_of_fold.csv",
            "advice": models / "advice",
            "stage1": models / "stage1",
            "stage2": models / "stage2",
            "evaluated": models / "report",
            "final": models / "final" / "model.safetensors",
            "out": models / "report" / "index.html",
        },
    }


STAGES: dict[str, Stage] = {
    stage.__name__: stage
    for stage in (prepare, extract, probe, advise, stage1, stage2, evaluate, report)
}


def call(name: str, ways: dict[str, Path], params: dict[str, Any]) -> dict[str, float]:
    """Run a stage as nobody did before, with these paths and params."""
    stage = STAGES[name]
    with tempfile.TemporaryDirectory() as state:
        resumes = {"resume": Resume(Path(state))} if "resume" in signature(stage).parameters else {}
        return stage(**ways, **arguments(stage, params), **resumes)


def run(folder: Path, params: dict[str, Any], *names: str) -> None:
    """Run the named stages, or all, with the given params and everything below one folder."""
    for name in names or STAGES:
        call(name, paths(folder)[name], params)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of sixteen colour images."""
    return write_photos(tmp_path / "photos")


@pytest.fixture(autouse=True)
def cache_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep trunk outputs out of the project's folder."""
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], str]) -> "Run":
    """Make a folder that tests may read, not change: one for all of pytest's processes."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, said = base / name, base / f"{name}.txt"
    with FileLock(base / f"{name}.lock"):
        if not said.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            said.write_text(make(folder), encoding="utf-8")
    return Run(folder, said.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole small run that tests may read, not change: see `paths` for what lies where."""

    def make(folder: Path) -> str:
        write_photos(folder / "photos")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PIPELINE_CACHE", str(folder / "cache"))
            run(folder, read_params(prepare={"path": str(folder / "photos")}))
        return ""

    return once(tmp_path_factory, "finished", make).folder


class Run(NamedTuple):
    """A folder after a run, not to be changed, and what DVC said."""

    folder: Path
    said: str


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The first `dvc repro`, in a committed repository."""

    def make(folder: Path) -> str:
        write_photos(folder / "repo" / PHOTOS)
        new_repository(folder / "repo", read_params(prepare={"path": PHOTOS}))
        said = dvc(folder / "repo", "repro")
        commit(folder / "repo", "run")
        return said

    made = once(tmp_path_factory, "first", make)
    return Run(made.folder / "repo", made.said)


@pytest.fixture
def repo(first: Run, tmp_path: Path) -> Path:
    """A copy of that repository, with its caches."""
    return shutil.copytree(first.folder, tmp_path / "repo")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", default=1, type=int, help="try so many times as much damage")


# The files whose long tests take longest.
LONGEST = (
    "test_docs.py",
    "test_sweep.py",
    "test_torture.py",
    "test_distributed.py",
    "test_hosts.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what takes longest first, so that no lane is left with it at the end."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
