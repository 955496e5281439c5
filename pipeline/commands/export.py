"""Export: the final model as safetensors and ONNX, checked on real images, with a model card.

    python -m pipeline export                  # after `dvc repro` or `dvc pull`
    python -m pipeline predict --model export/model.onnx new/*.jpg

The model card lists the data and params that DVC recorded, and the metrics of evaluate.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.commands.repository import RepositoryError, git, params_run_with
from pipeline.final_model import onnx as portable
from pipeline.final_model.classifier import Classifier, load
from pipeline.final_model.graph import Graph
from pipeline.images.shards import read_images
from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.nets.backbone import licence_of
from pipeline.nets.checkpoint import versions
from pipeline.nets.device import set_up_torch
from pipeline.stage_runtime.errors import CheckpointError, DataError
from pipeline.stage_runtime.files import whole_folder, write_text
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import load_yaml
from pipeline.statistics.verdict import interval_in_words

FINAL, REPORT = Path("models/final/model.safetensors"), Path("models/report/metrics.json")
PREPARED, LOCK = Path("data/prepared"), Path("dvc.lock")
CLOSE = 1e-4  # the largest allowed difference of a probability
CHECKED = 64  # number of images for this check
WRITTEN = {"model.safetensors", "model.onnx", "README.md"}
HOW = {
    "squash": "squashed to a square",
    "crop": "cropped to a square from the middle",
    "pad": "padded to a square",
}


def export(*, final: Path, report: Path, prepared: Path, lock: Path, out: Path) -> float:
    """Write model.safetensors, model.onnx and README.md, a model card, to `out`.

    Returns the largest difference between the ONNX graph's probabilities and PyTorch's on images of
    the test split, or of validation if there is none.

    Raises CheckpointError if that is more than 1e-4, DataError if the model, its metrics or its
    images are missing or don't belong together, or if `out` holds something else.
    """
    if out.exists() and (not out.is_dir() or {f.name for f in out.iterdir()} - WRITTEN):
        raise DataError(f"{out}: contains other files than an export; choose another --out")
    classifier = load(final)
    metrics = read_metrics(report, classifier)
    origin = provenance(lock)
    graph = Graph(classifier)
    images = some_images(prepared, graph.inputs.shape)
    with whole_folder(out) as folder:
        shutil.copy(final, folder / "model.safetensors")
        portable.write(classifier, graph, folder / "model.onnx")
        with torch.no_grad():
            expected = graph.probabilities(torch.from_numpy(images)).numpy()
        found = portable.Portable(folder / "model.onnx").probabilities(images)
        off = float(np.abs(found - expected).max())
        if not off <= CLOSE:
            raise CheckpointError(
                f"{final}: its ONNX graph differs by {off:.2g} on {len(images)} images, more than "
                f"{CLOSE:g}; use this file instead of an export"
            )
        as_run = classifier.probabilities(images)
        same = int((as_run.argmax(1) == expected.argmax(1)).sum())
        checked = (
            f"On {len(images)} images the graph's probabilities are within {off:.1g} of PyTorch's "
            f"in float32. Those of `model.safetensors`, run in {classifier.network.precision}, are "
            f"within {np.abs(as_run - expected).max():.1g}, with the same label on {same} images."
        )
        told = card(classifier, metrics, origin, checked)
        write_text(folder / "README.md", told)
    return off


def read_metrics(report: Path, classifier: Classifier) -> dict[str, Any]:
    """Read the metrics of evaluate, and refuse those of another run."""
    try:
        metrics: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{report}: no such file; run `dvc repro`") from None
    if metrics["chosen"] != classifier.chosen:
        raise DataError(
            f"{report}: it chose {metrics['chosen']}, but the final model is {classifier.chosen}; "
            "run `dvc repro`"
        )
    return metrics


def some_images(prepared: Path, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return packed images that the model wasn't trained on."""
    for split in ("test", "val"):
        images = read_images(prepared, split)
        if len(images):
            break
    if images.shape[1:] != shape:
        raise DataError(
            f"{prepared}: the images are {images.shape[1:]}, but the final model takes {shape}; "
            "run `dvc repro`"
        )
    return images[np.linspace(0, len(images) - 1, min(CHECKED, len(images))).astype(int)]


def provenance(lock: Path) -> dict[str, Any]:
    """Return the Git revision, and the data and params that DVC recorded."""
    try:
        content = load_yaml(lock.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{lock}: no such file; run `dvc repro`") from None
    prepared = content["stages"]["prepare"]["outs"]
    return {
        "revision": _git("rev-parse", "HEAD") or "none",
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "data": next(out["md5"] for out in prepared if "prepared" in out["path"]),
        "params": dict(sorted(params_run_with(content).items())),
    }


def _git(*words: str) -> str:
    """Return Git's output; empty without Git or without a repository."""
    try:
        return git(Path(), *words)
    except (OSError, RepositoryError):
        return ""


def card(
    classifier: Classifier, metrics: dict[str, Any], origin: dict[str, Any], checked: str
) -> str:
    """Return the model card: description, inputs and outputs, accuracy, and origin."""
    network = classifier.network
    backbone = network.backbone
    size, colours = network.packed_size, "grey" if network.channels == 1 else "RGB"
    shape = f"(N, {size}, {size})" if network.channels == 1 else f"(N, {size}, {size}, 3)"
    sure, point = classifier.sure_in_words, classifier.decision.point
    answers = "the likeliest class" if point is None else point.words(network.classes)
    tones = f" Before that, {network.tones.words}." if network.tones.words else ""
    changed = " with changes that aren't committed" if origin["changed"] else ""
    lines = [
        f"# {network.backbone.name}, {len(network.classes)} classes",
        "",
        f"{classifier.words}. Probabilities are calibrated on validation images.",
        "",
        "| label | class |",
        "|---|---|",
        *(f"| {i} | {_cell(name)} |" for i, name in enumerate(network.classes)),
        "",
        "## Use",
        "",
        f"`model.onnx` takes `pixels`, uint8 {shape}: the image turned as its EXIF data say, "
        f"{colours}, {HOW[network.fit]}, resized to {size} x {size} (Pillow's bicubic). All other "
        f"steps are in the graph.{tones} It returns `probabilities`, float32 "
        f"(N, {len(network.classes)}), and `answers`, int64 (N,): {answers}.",
        "",
        sure[0].upper() + sure[1:] + ".",
        "",
        "`model.safetensors` is the same model for this project: `python -m pipeline predict "
        "--model FILE IMAGE...` runs either file.",
        "",
        checked,
        "",
        "## Accuracy",
        "",
        *_figures(metrics),
        "",
        "## Origin",
        "",
        f"- Git revision: {origin['revision']}{changed}",
        f"- packed images (DVC): {origin['data']}",
        f"- initial weights: {network.backbone.weights} of {network.backbone.name}, "
        f"SHA-256 {network.backbone.sha256 or 'none'}",
        f"- licence of these weights: {licence_of(backbone.name, backbone.weights)}",
        "- libraries: " + ", ".join(f"{name} {v}" for name, v in versions().items()),
        "",
        "The licences of the data and of the initial weights may also apply to this model.",
        "",
        "| param | value |",
        "|---|---|",
        *(f"| {key} | {_cell(json.dumps(value))} |" for key, value in origin["params"].items()),
        "",
    ]
    return "\n".join(lines)


def _figures(metrics: dict[str, Any]) -> list[str]:
    if not metrics["test"]:
        return ["There was no labelled test split, so the test accuracy is not known."]
    found = metrics["test"][metrics["chosen"]]
    interval = interval_in_words(found["accuracy_low"], found["accuracy_high"])
    lines = ["On the test split, which no choice was based on:", "", "| metric | |", "|---|---|"]
    lines.append(f"| accuracy (95 % interval) | {found['accuracy']:.4f} ({interval}) |")
    rest = ("accuracy_weighted", "balanced_accuracy", "f1_macro", "auroc")
    return lines + [f"| {k} | {found[k]:.4f} |" for k in rest if found[k] is not None]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    """Run from the command line, in the project's folder."""
    parser = parser_of("export", __doc__ or "")
    parser.add_argument("--out", type=Path, default=Path("export"), help="(default: %(default)s)")
    out = parser.parse_args().out
    with one_line_errors():
        set_up_torch()
        off = export(final=FINAL, report=REPORT, prepared=PREPARED, lock=LOCK, out=out)
    say(f"{out}: model.safetensors, model.onnx (within {off:.1g} of PyTorch), README.md")
