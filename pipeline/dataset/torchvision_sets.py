"""The classification data sets of torchvision, written once to a folder of images."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pipeline.dataset.fetch import sources_folder
from pipeline.nets import torchvision_import as vision
from pipeline.stage_runtime.cache_entries import hold
from pipeline.stage_runtime.errors import DataError, ParamError, one_line, suggest
from pipeline.stage_runtime.progress import track

Splits = dict[str, dict[str, Any]]  # our split ("" for none) to torchvision's arguments

TRAIN_OR_NOT: Splits = {"train": {"train": True}, "test": {"train": False}}
TWO: Splits = {"train": {"split": "train"}, "test": {"split": "test"}}
THREE: Splits = {**TWO, "val": {"split": "val"}}
NONE: Splits = {"": {}}

SETS: dict[str, Splits] = {
    "CIFAR10": TRAIN_OR_NOT,
    "CIFAR100": TRAIN_OR_NOT,
    "Caltech101": NONE,
    "Caltech256": NONE,
    "Country211": {**TWO, "val": {"split": "valid"}},
    "DTD": THREE,
    "EMNIST": {s: {"split": "balanced", **how} for s, how in TRAIN_OR_NOT.items()},
    "EuroSAT": NONE,
    "FGVCAircraft": THREE,
    "FashionMNIST": TRAIN_OR_NOT,
    "Flowers102": THREE,
    "Food101": TWO,
    "GTSRB": TWO,
    "Imagenette": {"train": {"split": "train"}, "val": {"split": "val"}},
    "KMNIST": TRAIN_OR_NOT,
    "MNIST": TRAIN_OR_NOT,
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "PCAM": THREE,
    "QMNIST": TRAIN_OR_NOT,
    "RenderedSST2": THREE,
    "SEMEION": NONE,
    "STL10": TWO,
    "SUN397": NONE,
    "SVHN": TWO,
    "StanfordCars": TWO,
    "USPS": TRAIN_OR_NOT,
}


def published(name: str, path: Path) -> Path:
    """Return a folder of a data set's images as PNG: SPLIT/CLASS/*.png, or CLASS/*.png.

    Its files are expected at `path`, as torchvision lays them out; otherwise torchvision downloads
    (and verifies) them to the cache folder. The images are written there once.

    Raises ParamError for a name that is not in SETS, DataError if the data set can't be fetched.
    """
    if name not in SETS:
        known = [f"torchvision/{known}" for known in SETS]
        hint = suggest(f"torchvision/{name}", known)
        raise ParamError(f"params.yaml: prepare.source = 'torchvision/{name}': {hint}")
    target = sources_folder() / f"torchvision-{name}"
    with hold(target.parent, name):
        if not target.is_dir():
            fresh = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
            try:
                for split, arguments in SETS[name].items():
                    _write(name, _opened(name, arguments, path), fresh / split, split)
                os.replace(fresh, target)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return target


def _opened(name: str, arguments: dict[str, Any], path: Path) -> Any:
    make = getattr(vision.torchvision.datasets, name)
    try:
        return make(root=str(path), download=False, **arguments)
    except (RuntimeError, OSError):
        pass  # no copy there
    root = sources_folder() / "torchvision"
    root.mkdir(exist_ok=True)
    try:
        return make(root=str(root), download=True, **arguments)
    except Exception as error:  # each data set raises others
        said = one_line(error, 120)
        raise DataError(
            f"prepare.source: torchvision/{name}: can't be fetched ({said}); "
            f"put its files into {path} as torchvision.datasets.{name} lays them out"
        ) from None


def _write(name: str, images: Any, folder: Path, split: str) -> None:
    """Write a data set's images; a class has its name in the data set, or else its number."""
    names = getattr(images, "classes", None) or getattr(images, "categories", None) or []
    width = len(str(len(images)))
    numbers = range(len(images))
    for i in track(numbers, len(images), f"{name} {split}".strip()):
        image, label = images[i]
        called = str(names[label]) if names else str(label)
        file = folder / called.replace("/", "-") / f"{i:0{width}d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
