"""Write small public data sets that come in packages as folders of images, for trials.

    python runs/sets.py digits data/digits                  # scikit-learn's 1,797, 8 x 8 pixels
    python runs/sets.py digits data/few --each 20           # no more than so many a class
    python runs/sets.py emoji data/emoji --package FOLDER   # what `npm pack` gave, unpacked
    python runs/sets.py wafers data/wafers                  # the solar cells: mono or poly wafer

Emoji: the 64-pixel pictures of emoji-datasource-twitter and emoji-datasource-google (16.0.0; npm),
by category; the vendors' pictures of one emoji are a group. Wafers are an easy task on hard images.
"""

import argparse
import json
import shutil
from collections import Counter
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
    parser.add_argument("--each", type=int, default=10**9, metavar="N", help="groups a class")
    parser.add_argument("--package", type=Path, action="append", default=[], help="of emoji")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} is there already")
    if options.name == "digits":
        digits(options.out, options.each)
    elif options.name == "emoji":
        emoji(options.out, options.each, options.package)
    else:
        wafers(options.out, options.each)


def digits(out: Path, each: int) -> None:
    """Write the 8 x 8 grey digits as OUT/DIGIT/NUMBER.png."""
    found = load_digits()
    seen: Counter[int] = Counter()
    for number, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        seen[label] += 1
        if seen[label] <= each:
            file = out / str(label) / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(file)


def emoji(out: Path, each: int, packages: list[Path]) -> None:
    """Write emoji as OUT/CATEGORY/EMOJI/VENDOR.png, those that every vendor has."""
    vendors = {next((p / "img").iterdir()).name: p for p in packages}
    listed = json.loads((packages[0] / "emoji.json").read_text(encoding="utf-8"))
    seen: Counter[str] = Counter()
    for entry in sorted(listed, key=lambda e: e["unified"]):
        category = entry["category"]
        if category == "Component" or not all(entry[f"has_img_{v}"] for v in vendors):
            continue
        seen[category] += 1
        if seen[category] <= each:
            for vendor, package in vendors.items():
                file = out / category / entry["unified"] / f"{vendor}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(package / "img" / vendor / "64" / entry["image"], file)


def wafers(out: Path, each: int) -> None:
    """Copy the solar cells as OUT/WAFER/MODULE/NAME.png."""
    found = elpv()
    modules: dict[str, set[str]] = {}
    for item in found.items:
        wafer = item.group.split("-")[0]
        of_wafer = modules.setdefault(wafer, set())
        if item.group in of_wafer or len(of_wafer) < each:
            of_wafer.add(item.group)
            file = out / wafer / item.group / Path(item.path).name
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found.folder / item.path, file)


if __name__ == "__main__":
    main()
