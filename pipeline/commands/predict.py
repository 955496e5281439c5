"""Predict: label and calibrated probability of new images, with the final model.

    python -m pipeline predict a.jpg new/                  # files, and all files below a folder
    python -m pipeline predict new/ --top 3 --csv > new.csv
    python -m pipeline predict new/ --page new.html        # a page of the images with their labels
    find new -name '*.jpg' | python -m pipeline predict -  # paths, one per line
    python -m pipeline predict - < a.jpg                   # or an image itself

With `evaluate.operating_point`, the answer is the one that it asks for. Predictions below a
confidence threshold are "not sure". Above it, the share `evaluate.sure_accuracy` is right, as far
as the validation images can show; if they can't show it, there is no threshold, and `sure` is null.
Exit codes: 0 every file was classified, 1 a file isn't an image or can't be read, or another error,
2 a wrong command.
"""

import csv
import io
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from pipeline.commands.table import aligned
from pipeline.dataset.decode import CLIPPED, Decoded, decoded
from pipeline.dataset.formats import SUFFIXES, opened, suffix, what_else
from pipeline.final_model import classifier
from pipeline.final_model import onnx as portable
from pipeline.images.shards import Pixels
from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.nets.batches import eval_batch
from pipeline.nets.device import set_up_torch
from pipeline.pages.render import picture, render
from pipeline.stage_runtime.errors import DataError
from pipeline.stage_runtime.files import path_cell, shown, text_cell, walk, write_text
from pipeline.stage_runtime.settings import threads

TEMPLATE = Path(__file__).parent / "pages" / "predictions.html"
NOT_SURE = "not sure"
STDIN = "-"
SIDE = 224  # width of an image on a page, in pixels
Model = classifier.Classifier | portable.Portable


@dataclass(frozen=True)
class Answer:
    """The prediction for one image, the answer first, then by probability; or why it has none."""

    file: str
    labels: list[str] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    sure: bool | None = None  # None: the model has no threshold
    error: str = ""
    pixels: Pixels | None = None  # the input of the model
    beyond: float | None = None  # the share of values outside the model's range, if it has one

    def row(self) -> dict[str, Any]:
        """Return its JSON object, or its row of a CSV file."""
        if self.error:
            return {"file": self.file, "error": self.error}
        best = {"label": self.labels[0], "probability": self.probabilities[0], "sure": self.sure}
        more = {
            f"{name}_{place}": values[place - 1]
            for place in range(2, len(self.labels) + 1)
            for name, values in (("label", self.labels), ("probability", self.probabilities))
        }
        beyond = {} if self.beyond is None else {"beyond_range": self.beyond}
        return {"file": self.file, **best, **more, **beyond}


def load(file: Path) -> Model:
    """Read a final model, or an export of it.

    Raises CheckpointError if the file is neither.
    """
    return portable.Portable(file) if file.suffix == ".onnx" else classifier.load(file)


def predict(model: Model, files: Sequence[Path], top: int = 1) -> Iterator[Answer]:
    """Classify image files, a batch at a time, with the `top` likeliest labels of each."""
    network = model.network

    def read(file: Path) -> Decoded | DataError:
        shape = (network.packed_size, network.fit, network.channels)
        try:
            _refuse_others(file)
            return decoded(file, *shape, network.tones)
        except DataError as error:
            return error

    with ThreadPoolExecutor(threads()) as pool:
        for start in range(0, len(files), eval_batch()):
            batch = files[start : start + eval_batch()]
            found = list(pool.map(read, batch))
            pixels = [one.pixels for one in found if not isinstance(one, DataError)]
            answers = iter(model.probabilities(np.stack(pixels)) if pixels else ())
            for file, one in zip(batch, found, strict=True):
                if isinstance(one, DataError):
                    yield Answer(str(file), error=str(one))
                    continue
                p: NDArray[np.float64] = next(answers)
                [answer] = model.decision.answers(p[None])
                # The answer first: with an operating point it need not be the likeliest class.
                ranked = sorted(range(len(p)), key=lambda i: (i != answer, -p[i]))[:top]
                yield Answer(
                    str(file),
                    [network.classes[i] for i in ranked],
                    [round(float(p[i]), 4) for i in ranked],
                    model.decision.is_sure(float(p[answer]), int(answer)),
                    pixels=one.pixels,
                    beyond=None if network.tones.low is None else round(one.clipped, 4),
                )


def _refuse_others(file: Path) -> None:
    """Refuse a file that isn't an image, and name its kind; pipes and devices aren't opened."""
    if not file.is_file():
        raise DataError(f"{file}: not a regular file, or a dangling link; name a file")
    if suffix(file.name) not in SUFFIXES and (what := what_else(file)):
        raise DataError(f"{file}: {what}")


def listed(names: Sequence[str], scratch: Path) -> list[Path]:
    """List the files that arguments name: files, folders, or `-` for standard input.

    All files below a folder are listed, whatever they are, so that each is accounted for. An image
    on standard input is written to `scratch`. Raises DataError naming a file that is missing.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if name == STDIN:
            files += _from_stdin(sys.stdin.buffer.read(), scratch)
        elif path.is_dir():
            tree = walk(path)
            below = sorted([*tree.files, *tree.odd])
            if not below:
                raise DataError(f"{path}: no files below it")
            files += [path / file for file in below]
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file")
    return files


def _from_stdin(content: bytes, scratch: Path) -> list[Path]:
    try:
        opened(io.BytesIO(content)).close()
    except Exception:  # not an image: paths
        lines = content.decode(errors="surrogateescape").splitlines()
        return listed([line for line in lines if line not in ("", STDIN)], scratch)
    file = scratch / "standard input"
    file.write_bytes(content)
    return [file]


def main() -> None:
    """Run from the command line."""
    parser = parser_of("predict", __doc__ or "")
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, a folder, or - for stdin")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="labels per image")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    parser.add_argument("--page", type=Path, metavar="HTML", help="also write a page of the images")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("models/final/model.safetensors"),
        help="a final model, or an export of it as ONNX (default: %(default)s)",
    )
    options = parser.parse_args()
    if options.top < 1:
        parser.error("--top must be at least 1")
    with one_line_errors(), tempfile.TemporaryDirectory() as scratch:
        set_up_torch()
        files = listed(options.files, Path(scratch))
        model = load(options.model)
        found = predict(model, files, options.top)
        # The pixels of a million images would fill the memory.
        answers = list(found if options.page else (replace(one, pixels=None) for one in found))
        write = as_json if options.json else as_csv if options.csv else as_table
        write(answers, sys.stdout)
        if options.page:
            write_text(options.page, page(answers))
        if beyond := [one for one in answers if (one.beyond or 0) > CLIPPED]:
            low, high = model.network.tones.low, model.network.tones.high
            print(
                f"note: {len(beyond)} images have more than {CLIPPED:.0%} of their values outside "
                f"{low:g} to {high:g}, the range of the training images ({beyond[0].file}, ...)",
                file=sys.stderr,
            )
        failed = [answer for answer in answers if answer.error]
        for answer in failed if options.json or options.csv else []:
            print(f"error: {answer.error}", file=sys.stderr)
        sys.exit(bool(failed))


def as_json(answers: Sequence[Answer], out: TextIO) -> None:
    """Write a list of objects, one per image."""
    text = json.dumps([answer.row() for answer in answers], indent=2, ensure_ascii=False)
    try:
        text.encode(out.encoding or "utf-8")
    except UnicodeEncodeError:  # a file name in no encoding, or a terminal without the character
        text = json.dumps([answer.row() for answer in answers], indent=2)
    out.write(f"{text}\n")


def as_csv(answers: Sequence[Answer], out: TextIO) -> None:
    """Write one row per image, without cells that a spreadsheet takes for a formula."""
    rows = [answer.row() for answer in answers]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    # Without quotes, a carriage return in a name would start a new line, and thus a new cell.
    odd = any("\r" in str(value) for row in rows for value in row.values())
    writer = csv.DictWriter(
        out, columns, lineterminator="\n", quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL
    )
    writer.writeheader()
    for row in rows:
        cells = {k: text_cell(v) if isinstance(v, str) else v for k, v in row.items()}
        writer.writerow({**cells, "file": path_cell(row["file"])})


def as_table(answers: Sequence[Answer], out: TextIO) -> None:
    """Write aligned columns; long paths are not shortened."""
    cells = [("file", "label", "probability")]
    for answer in answers:
        if answer.error:
            cells.append((answer.file, "-", answer.error.removeprefix(f"{answer.file}: ")))
            continue
        for place, (label, p) in enumerate(zip(answer.labels, answer.probabilities, strict=True)):
            first = place == 0
            name = f"{label} ({NOT_SURE})" if first and answer.sure is False else label
            cells.append((answer.file if first else "", name, f"{p:.3f}"))
    for line in aligned(cells):
        print(line, file=out)


def page(answers: Sequence[Answer]) -> str:
    """Return one self-contained page of the images with their labels."""
    unsure = sum(answer.sure is False for answer in answers)
    failed = sum(bool(answer.error) for answer in answers)
    counts = f"{len(answers)} images, {unsure} not sure, {failed} not readable"
    cards = [
        {
            **vars(answer),
            "file": shown(answer.file),
            "error": shown(answer.error),
            "picture": None if answer.pixels is None else picture(answer.pixels, SIDE),
            "found": list(zip(answer.labels, answer.probabilities, strict=True)),
        }
        for answer in answers
    ]
    return render(TEMPLATE, counts=counts, cards=cards)
