"""Write small public data sets that come in packages as folders of images, for trials.

    python -m runs.sets digits data/digits                   # scikit-learn's 1,797 of 8 x 8 pixels
    python -m runs.sets emoji data/emoji --package A --package B
    python -m runs.sets wafers data/wafers                   # the solar cells: mono or poly wafer

Emoji are the 64-pixel pictures of the npm packages emoji-datasource-twitter and -google (16.0.0),
unpacked at A and B, by category; the vendors' pictures of one emoji are a group. For few training
images set prepare.test_fraction.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.images.sources import elpv


def main() -> None:
    """Write one set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("name", choices=("digits", "emoji", "wafers"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--package", type=Path, action="append", default=[], help="of emoji")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} is there already")
    if options.name == "digits":
        digits(options.out)
    elif options.name == "emoji":
        emoji(options.out, options.package)
    else:
        wafers(options.out)


def digits(out: Path) -> None:
    """Write the 8 x 8 grey digits as OUT/DIGIT/NUMBER.png."""
    found = load_digits()
    for number, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        file = out / str(label) / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(file)


def emoji(out: Path, packages: list[Path]) -> None:
    """Copy emoji as OUT/CATEGORY/EMOJI/VENDOR.png, those that every vendor has."""
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


if __name__ == "__main__":
    main()
