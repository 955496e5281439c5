"""Compare backbones by their probes over data sets and seeds, from codes computed once.

    python -m runs.backbones elpv-image elpv-group clothing=FOLDER signs=FOLDER
    python -m runs.backbones elpv-group --backbones timm/tf_efficientnet_lite0 timm/NAME --seeds 5 6

Each data set is packed and run through each network once. Each seed draws a split of its images, as
`prepare` does, and the probe is chosen by cross-validation on the training images of that split. A
given test folder stays the test split; its images are not used. Prints each cross-validated
accuracy, the difference from the first backbone, paired by seed, and the seconds of extract.
Finished parts are kept in --keep, so that a killed comparison goes on.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset.split import draw
from pipeline.extract import extract
from pipeline.images.rows import Rows
from pipeline.nets.automatic import usual_size
from pipeline.nets.backbone import skeleton
from pipeline.prepare import prepare
from pipeline.probe import probe
from pipeline.probing.codes import codes_name, write_labels
from pipeline.stage_runtime.files import whole_folder
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import arguments, read_params

LITE = tuple(f"timm/tf_efficientnet_lite{n}" for n in (0, 1, 2))
SPLITS = ("train", "val", "test")


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("sets", nargs="+", metavar="NAME[=FOLDER]")
    parser.add_argument("--backbones", nargs="+", default=LITE)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5, 10))
    parser.add_argument("--keep", type=Path, default=Path("data/backbones"))
    options = parser.parse_args()
    apart: dict[str, list[float]] = {name: [] for name in options.backbones}
    for one in options.sets:
        name, _, folder = one.partition("=")
        found = {
            backbone: compared(options.keep / name, name, folder, backbone, options.seeds)
            for backbone in options.backbones
        }
        base = next(iter(found.values()))
        for backbone, (accuracies, seconds) in found.items():
            gaps = [100 * (a - b) for a, b in zip(accuracies, base[0], strict=True)]
            apart[backbone].append(mean(gaps))
            spread = f" ± {stdev(gaps):.1f}" if len(gaps) > 1 else ""
            say(
                f"{name:<12} {backbone:<32} {mean(accuracies):.4f}  {mean(gaps):+.1f}{spread} "
                f"points  extract {seconds:.0f} s, {seconds / base[1]:.2f} of the first's"
            )
    for backbone, gaps in apart.items():
        say(f"{'mean':<12} {backbone:<32} {mean(gaps):+.2f} points over {len(gaps)} sets")


def compared(
    keep: Path, name: str, folder: str, backbone: str, seeds: list[int]
) -> tuple[list[float], float]:
    """Return a backbone's cross-validated accuracies on a set, by seed, and extract's seconds."""
    params = read_params(Path("params.yaml"))
    params["backbone"]["name"] = backbone
    params["prepare"]["size"] = max(params["prepare"]["size"], usual_size(skeleton(backbone)))
    if folder:
        params["prepare"] |= {"source": "folder", "path": folder, "not_images": "skip"}
        params["flips"] = "horizontal"
    by_image = name.endswith("-image")
    if by_image:
        params["prepare"]["split_by"] = "image"
    prepared = keep.parent / f"{name.removesuffix('-image').removesuffix('-group')}"
    prepared = prepared.with_name(f"{prepared.name}-{params['prepare']['size']}px")
    at = prepared.with_name(f"{prepared.name}-{backbone.rpartition('/')[2]}")
    if not prepared.exists():
        with whole_folder(prepared) as out:
            prepare(out=out, **arguments(prepare, params), resume=Resume(keep / "state"))
    if not at.exists():
        with whole_folder(at) as out:
            start = perf_counter()
            rest = {**arguments(extract, params), "resume": Resume(keep / "state")}
            extract(prepared=prepared, out=out / "codes", **rest)
            (out / "seconds.json").write_text(json.dumps(perf_counter() - start))
    accuracies = [of_seed(keep, prepared, at / "codes", params, seed, by_image) for seed in seeds]
    seconds: float = json.loads((at / "seconds.json").read_text())
    return accuracies, seconds


def of_seed(
    keep: Path, prepared: Path, codes: Path, params: dict[str, Any], seed: int, by_image: bool
) -> float:
    """Return the probe's cross-validated accuracy on the split that a seed draws."""
    kept = keep / f"{codes.parent.name}-{seed}.json"
    if not kept.exists():
        rows, was = all_rows(prepared, by_image)
        of = drawn(rows, was, params["prepare"], seed)
        features = keep / "features"
        shutil.rmtree(features, ignore_errors=True)
        features.mkdir(parents=True)
        facts = json.loads((codes / "facts.json").read_text())
        (features / "facts.json").write_text(json.dumps(facts))
        for depth in facts["depths"]:
            whole = np.concatenate(
                [np.load(codes / f"{codes_name(split, depth)}.npy") for split in SPLITS]
            )
            for split in SPLITS[:2]:
                np.save(features / f"{codes_name(split, depth)}.npy", whole[of == split])
        write_labels(
            features / "labels.csv", {split: chosen(rows, of == split) for split in SPLITS[:2]}
        )
        with_seed = arguments(probe, {**params, "seed": seed})
        out = keep / "probe"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        probe(features=features, out=out, **with_seed, resume=Resume(out / "state"))
        kept.write_text((out / "metrics.json").read_text())
    found: float = json.loads(kept.read_text())["probe"]["cv_accuracy"]
    return found


def all_rows(prepared: Path, by_image: bool) -> tuple[Rows, NDArray[np.str_]]:
    """Return all images, in the order of their codes, and the splits they were packed in."""
    with (prepared / "index.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    lines.sort(key=lambda line: SPLITS.index(line["split"]))
    names = sorted({line["label"] for line in lines})
    groups = [i if by_image else int(line["group"]) for i, line in enumerate(lines)]
    rows = Rows(
        np.arange(len(lines)),
        [line["path"] for line in lines],
        np.array([names.index(line["label"]) for line in lines]),
        np.array(groups),
        np.array([float(line["weight"]) for line in lines]),
    )
    return rows, np.array([line["split"] for line in lines])


def drawn(rows: Rows, was: NDArray[np.str_], params: dict[str, Any], seed: int) -> NDArray[np.str_]:
    """Draw test and validation images as `prepare` does."""
    given = (Path(params["path"]) / "test").is_dir()
    of = np.where((was == "test") & given, "test", "train").astype(was.dtype)
    for split in ("val",) if given else ("test", "val"):
        train = np.flatnonzero(of == "train")
        fraction = params[f"{split}_fraction"]
        of[train[draw(rows.labels[train], rows.groups[train], fraction, seed)]] = split
    return of


def chosen(rows: Rows, which: NDArray[np.bool_]) -> Rows:
    """Return some of the rows."""
    paths = [path for path, one in zip(rows.paths, which, strict=True) if one]
    labels, groups = rows.labels[which], rows.groups[which]
    return Rows(rows.ids[which], paths, labels, groups, rows.weights[which])


if __name__ == "__main__":
    main()
