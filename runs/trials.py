"""Data sets for trials: packed for each seed, with codes that are computed once for all seeds.

Each seed draws other splits, as `prepare` does. Everything is kept in a folder, so that a killed
trial goes on where it was.
"""

import csv
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.extract import extract
from pipeline.images.shards import SPLITS, read_splits
from pipeline.nets.automatic import usual_size
from pipeline.nets.backbone import skeleton
from pipeline.prepare import prepare
from pipeline.probe import probe
from pipeline.probing.codes import codes_name, write_labels
from pipeline.stage1 import stage1
from pipeline.stage2 import stage2
from pipeline.stage_runtime.files import whole_folder
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import arguments, read_params

LABELLED = SPLITS[:2]  # what the probe reads; the codes of test images are for evaluate alone
# How the labels of other sets than photographs allow images to be flipped.
FLIPS = {"digits": "none", "mnist": "none", "wafers": "dihedral"}


@dataclass(frozen=True)
class Trial:
    """A data set: ELPV by group or by image, or a folder of class folders."""

    name: str  # elpv-group, elpv-image, or any other with a folder
    folder: str
    keep: Path  # the folder for what is computed

    @classmethod
    def named(cls, text: str, keep: Path) -> "Trial":
        """Read NAME or NAME=FOLDER."""
        name, _, folder = text.partition("=")
        return cls(name, folder, keep)

    def params(self, backbone: str = "", size: int = 0) -> dict[str, Any]:
        """Return the project's params for this set: photographs are flipped horizontally."""
        params = read_params(Path("params.yaml"))
        if self.folder:
            params["prepare"] |= {"source": "folder", "path": self.folder, "not_images": "skip"}
            params["flips"] = FLIPS.get(self.name, "horizontal")
        if self.name.endswith("-image"):
            params["prepare"]["split_by"] = "image"
        if size:
            params["prepare"]["size"] = size
        if backbone:
            params["backbone"]["name"] = backbone
        return params

    def prepared(self, seed: int, size: int = 0) -> Path:
        """Pack the images with the splits that a seed draws."""
        params = self.params(size=size) | {"seed": seed}
        made = self.keep / self.name / f"prepared-{seed}-{params['prepare']['size']}px"
        return once(made, lambda out: _run(prepare, params, out=out))

    def codes(self, backbone: str) -> tuple[Path, float]:
        """Compute the codes of all images, at the network's own size; return the seconds too."""
        size = max(self.params()["prepare"]["size"], usual_size(skeleton(backbone)))
        made = (
            self.keep
            / self.name.removesuffix("-group").removesuffix("-image")
            / f"codes-{backbone.replace('/', '-')}"
        )

        def compute(out: Path) -> None:
            packed = self.prepared(0, size)
            start = time.perf_counter()
            _run(extract, self.params(backbone, size), prepared=packed, out=out / "codes")
            (out / "seconds.json").write_text(json.dumps(time.perf_counter() - start))
            shutil.copy(packed / "index.csv", out)

        once(made, compute)
        seconds: float = json.loads((made / "seconds.json").read_text())
        return made, seconds

    def features(self, backbone: str, seed: int) -> Path:
        """Divide the codes by the splits that a seed draws."""
        made = self.keep / self.name / f"features-{backbone.replace('/', '-')}-{seed}"
        return once(made, lambda out: self._divide(backbone, seed, out))

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

    def probed(self, backbone: str, seed: int) -> Path:
        """Fit the probes on the training images of a seed's splits."""
        params = self.params(backbone) | {"seed": seed}
        made = self.keep / self.name / f"probe-{backbone.replace('/', '-')}-{seed}"
        features = self.features(backbone, seed)
        return once(made, lambda out: _run(probe, params, features=features, out=out))


def fine_tuned(
    prepared: Path, fitted: Path, params: dict[str, Any], folder: Path
) -> tuple[Path, Path]:
    """Run stages 1 and 2 in a folder, from a file of probes; return the folders they wrote."""
    ones, twos = folder / "stage1", folder / "stage2"
    for out in (ones, twos):
        out.mkdir()
    _run(stage1, params, out=ones, prepared=prepared, probe=fitted)
    _run(stage2, params, out=twos, prepared=prepared, stage1=ones / "model.safetensors")
    return ones, twos


def once(made: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder if it is not there yet; a part of it is never kept."""
    if not made.exists():
        with whole_folder(made) as out:
            make(out)
    return made


def _run(stage: Callable[..., Any], params: dict[str, Any], **paths: Path) -> None:
    with tempfile.TemporaryDirectory(dir=next(iter(paths.values())).parent) as state:
        stage(**paths, **arguments(stage, params), resume=Resume(Path(state)))
