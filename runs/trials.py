"""Data sets for trials: packed for each seed, with codes that are computed once for all seeds.

Each seed draws other splits, as `prepare` does. Everything is kept in a folder, so that a killed
trial goes on where it was.
"""

import csv
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset.sources import elpv
from pipeline.extract import extract
from pipeline.images.shards import SPLITS, read_splits
from pipeline.nets.automatic import usual_size
from pipeline.nets.backbone import skeleton
from pipeline.prepare import prepare
from pipeline.probe import probe
from pipeline.probing.codes import codes_name, read_codes, write_labels
from pipeline.probing.probes import read_probes
from pipeline.stage_runtime.files import whole_folder, write_csv
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import arguments, read_params

LABELLED = SPLITS[:2]  # what the probe reads; the codes of test images are for evaluate alone
# How the labels of other sets than photographs allow images to be flipped.
FLIPS = {"digits": "none", "mnist": "none", "wafers": "dihedral"}
HELD_OUT = 450  # images at most, of a part of a set
ATTEMPTS = 100  # at a part with enough images of each class
# The sections of the params that each of what is kept depends on.
OF_PACKED = ("prepare",)
OF_CODES = (*OF_PACKED, "backbone", "extract", "flips", "precision")
OF_PROBES = (*OF_CODES, "probe", "measure", "sample_weight", "class_weight")

Row = dict[str, str]


@dataclass(frozen=True)
class Trial:
    """A data set: ELPV by group or by image, or a folder of class folders; or a part of it.

    A part has so many of the training images, a quarter as many for validation, and others of the
    training and validation images as its test split, so that one may choose by it.
    """

    set: str  # elpv-group, elpv-image, or any other with a folder
    folder: str
    keep: Path  # the folder for what is computed
    images: int = 0  # 0: all

    @classmethod
    def named(cls, text: str, keep: Path) -> "Trial":
        """Read NAME, NAME=FOLDER, NAME:IMAGES or NAME:IMAGES=FOLDER."""
        name, _, folder = text.partition("=")
        name, _, images = name.partition(":")
        if images and not images.isdecimal():
            raise SystemExit(f"{text}: expected NAME, NAME=FOLDER or NAME:IMAGES=FOLDER")
        return cls(name, folder, keep, int(images or 0))

    @property
    def name(self) -> str:
        """What to call it."""
        return f"{self.set}:{self.images}" if self.images else self.set

    @property
    def kept(self) -> Path:
        """Where what is computed of it lies."""
        return self.keep / self.name.replace(":", "-")

    def whole(self) -> "Trial":
        """Return the set that this is a part of; ELPV by image has the codes of that by group."""
        name = "elpv-group" if self.set.startswith("elpv-") else self.set
        return replace(self, images=0, set=name)

    def params(self, backbone: str = "", size: int = 0) -> dict[str, Any]:
        """Return the project's params for this set: photographs are flipped horizontally."""
        params = read_params(Path("params.yaml"))
        if self.folder:
            params["prepare"] |= {"source": "folder", "path": self.folder, "not_images": "skip"}
            params["flips"] = FLIPS.get(self.set, "horizontal")
        if self.set.endswith("-image"):
            params["prepare"]["split_by"] = "image"
        if size:
            params["prepare"]["size"] = size
        if backbone:
            params["backbone"]["name"] = backbone
        return params

    def prepared(self, seed: int, size: int = 0) -> Path:
        """Pack the images with the splits that a seed draws."""
        params = self.params(size=size) | {"seed": seed}
        made = self.kept / f"prepared-{seed}-{params['prepare']['size']}px"
        if self.images:
            at, of = self.kept / f"drawn-{seed}", _sections(params, OF_PACKED)
            part = once(at, of, lambda out: self._draw(seed, out))
            params["prepare"] |= {"source": "csv", "path": str(part), "table": "part.csv"}
        of = _sections(params, OF_PACKED)
        return once(made, of, lambda out: _run(prepare, params, out=out))

    def _draw(self, seed: int, out: Path) -> None:
        """Draw a part of the images, and write it as a folder with a table."""
        whole = replace(self, images=0).prepared(seed)
        with (whole / "index.csv").open(newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.DictReader(lines) if row["split"] in LABELLED]
        val = self.images // 4
        held_out = min(HELD_OUT, len(rows) - self.images - val)
        if held_out < 1:
            raise SystemExit(f"{self.name}: only {len(rows)} images to draw from")
        params = self.params()
        least = max(params["prepare"]["least_per_class"], params["probe"]["folds"])
        sizes = {"test": held_out, "val": val, "train": self.images}
        root = Path(self.folder) if self.folder else elpv().folder
        of_part = drawn(rows, sizes, least, seed)
        for row in of_part:
            file = out / row["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / row["path"], file)
        columns = ("path", "label", "split", "group", "weight")
        write_csv(out / "part.csv", [columns, *([row[c] for c in columns] for row in of_part)])

    def codes(self, backbone: str = "") -> tuple[Path, float]:
        """Compute the codes of all images, at the network's own size; return the seconds too."""
        whole = self.whole()
        params = whole.params(backbone)
        name = params["backbone"]["name"]
        size = max(params["prepare"]["size"], usual_size(skeleton(name)))

        def compute(out: Path) -> None:
            packed = whole.prepared(0, size)
            start = time.perf_counter()
            _run(extract, params, prepared=packed, out=out / "codes")
            (out / "seconds.json").write_text(json.dumps(time.perf_counter() - start))
            shutil.copy(packed / "index.csv", out)

        of = _sections(params, OF_CODES)
        made = once(whole.kept / f"codes-{name.replace('/', '-')}", of, compute)
        seconds: float = json.loads((made / "seconds.json").read_text())
        return made, seconds

    def features(self, seed: int, backbone: str = "") -> Path:
        """Divide the codes by the splits that a seed draws."""
        params = self.params(backbone)
        made = self.kept / f"features-{params['backbone']['name'].replace('/', '-')}-{seed}"
        return once(
            made, _sections(params, OF_CODES), lambda out: self._divide(backbone, seed, out)
        )

    def _divide(self, backbone: str, seed: int, out: Path) -> None:
        of_all, _ = self.codes(backbone)
        with (of_all / "index.csv").open(newline="", encoding="utf-8") as file:
            paths = [(row["split"], row["path"]) for row in csv.DictReader(file)]
        paths.sort(key=lambda pair: SPLITS.index(pair[0]))
        place = {path: i for i, (_, path) in enumerate(paths)}
        rows, _ = read_splits(self.prepared(seed), SPLITS)
        facts = json.loads((of_all / "codes" / "facts.json").read_text())
        (out / "facts.json").write_text(json.dumps(facts))
        labelled = dict(zip(LABELLED, rows, strict=False))
        write_labels(out / "labels.csv", labelled)
        for depth in facts["depths"]:
            files = (of_all / "codes" / f"{codes_name(split, depth)}.npy" for split in SPLITS)
            whole = np.concatenate([np.load(file) for file in files if file.exists()])
            for split, of_split in zip(SPLITS, rows, strict=True):
                chosen = whole[[place[path] for path in of_split.paths]]
                np.save(out / f"{codes_name(split, depth)}.npy", chosen)

    def probed(self, seed: int, backbone: str = "") -> Path:
        """Fit the probes on the training images of a seed's splits, and score val and test."""
        params = self.params(backbone) | {"seed": seed}

        def fit(out: Path) -> None:
            features = self.features(seed, backbone)
            _run(probe, params, features=features, out=out)
            best, _, _ = read_probes(out / "probe.safetensors")
            scores: dict[str, Any] = {
                f"probe-{split}": best.scores(read_codes(features, split, best.depth))
                for split in ("val", "test")
            }
            np.savez_compressed(out / "scores.npz", **scores)

        return once(self.fitted(seed, backbone), _sections(params, OF_PROBES), fit)

    def fitted(self, seed: int, backbone: str = "") -> Path:
        """Return where the probes of a seed's splits lie, or will."""
        name = self.params(backbone)["backbone"]["name"]
        return self.kept / f"probe-{name.replace('/', '-')}-{seed}"


def drawn(rows: Sequence[Row], sizes: dict[str, int], least: int, seed: int) -> list[Row]:
    """Draw rows for each split, by whole groups but for the last, with `least` of each class.

    Raises SystemExit if no draw has so many training images of each class.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"] or row["path"], []).append(row)
    for attempt in range(ATTEMPTS):
        order = np.random.default_rng([seed, attempt]).permutation(len(groups))
        shuffled = [list(groups.values())[place] for place in order]
        found: list[Row] = []
        for split, size in sizes.items():
            n = 0
            while n < size and shuffled:
                of_group = shuffled.pop()[: size - n]
                found += [{**row, "split": split} for row in of_group]
                n += len(of_group)
        each = Counter(row["label"] for row in found if row["split"] == "train")
        if min(each[row["label"]] for row in rows) >= least:
            return found
    raise SystemExit(f"no draw of {sizes['train']} images has {least} of each class")


def trained(stage: Callable[..., Any], folder: Path, params: dict[str, Any], **paths: Path) -> Path:
    """Run stage 1 or 2 below a folder; return the folder it wrote."""
    out = folder / stage.__name__
    out.mkdir()
    _run(stage, params, out=out, **paths)
    return out


def once(made: Path, params: dict[str, Any], make: Callable[[Path], object]) -> Path:
    """Make a folder if it is not there yet; a part of it is never kept.

    Raises SystemExit if it was made with other params. It can't tell if the code was another.
    """
    facts, told = made / "made_with.json", json.dumps(params, sort_keys=True)
    if not made.exists():
        with whole_folder(made) as out:
            make(out)
            (out / facts.name).write_text(told)
    elif not facts.exists() or facts.read_text() != told:
        raise SystemExit(f"{made}: was made with other params; delete it, or set --keep")
    return made


def _sections(params: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: params[name] for name in names}


def _run(stage: Callable[..., Any], params: dict[str, Any], **paths: Path) -> None:
    with tempfile.TemporaryDirectory(dir=next(iter(paths.values())).parent) as state:
        stage(**paths, **arguments(stage, params), resume=Resume(Path(state)))
