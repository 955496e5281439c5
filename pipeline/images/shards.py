"""The packed images: shards of square images, raw or as JPEG, and the index of their rows."""

import csv
import io
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.images.rows import Rows
from pipeline.images.tones import PLAIN, Tones, of_facts
from pipeline.stage_runtime.errors import DataError, ParamError
from pipeline.stage_runtime.files import reading
from pipeline.stage_runtime.settings import threads

Fit = Literal["squash", "crop", "pad"]  # how an image becomes a square
Storage = Literal["raw", "jpeg"]
Pixels = NDArray[np.uint8]
SPLITS = ("train", "val", "test")
SHARD = 1024  # images in each but the last
QUALITY = 95  # of JPEG, without subsampling of colours


@dataclass(frozen=True)
class Facts:
    """The properties of the packed images that later stages need, written once by prepare."""

    classes: list[str]
    size: int  # side in pixels
    fit: Fit
    channels: int  # 1 for grey, else 3
    storage: Storage
    pixels: str  # SHA-256 over all shards
    tones: Tones = PLAIN

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of an image: (H, W) if grey, else (H, W, 3)."""
        return (self.size, self.size) if self.channels == 1 else (self.size, self.size, 3)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as they are written."""
        facts = {name: value for name, value in vars(self).items() if name != "tones"}
        return {**facts, **self.tones.facts()}


class Shard(NamedTuple):
    """Some images on disk."""

    content: NDArray[np.uint8]  # (n, H, W[, 3]), or the bytes of n JPEG files
    ends: NDArray[np.int64]  # the end of each in these bytes, (n,)


class Images:
    """Some of the packed images, (N, H, W) or (N, H, W, 3), read on access.

    The index is a row, a slice, or an array of rows.

    Raises DataError if the images are missing or of another shape.
    """

    def __init__(self, prepared: Path, facts: Facts, rows: NDArray[np.int64]) -> None:
        self._facts, self._rows, self._folder = facts, rows, prepared / "images"
        self.shape = (len(rows), *facts.shape)
        last = {int(row) // SHARD: int(row) % SHARD for row in np.sort(rows)}
        self._shards = {shard: self._opened(shard, place) for shard, place in last.items()}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, which: int | slice | NDArray[np.int64]) -> Pixels:
        rows = np.atleast_1d(self._rows[which])
        pixels = np.empty((len(rows), *self.shape[1:]), np.uint8)
        if self._facts.storage == "jpeg":
            for i, image in enumerate(self._pool.map(self._decoded, rows.tolist())):
                pixels[i] = image
        else:
            of = rows // SHARD
            for shard in np.unique(of):
                pixels[of == shard] = self._shards[shard].content[rows[of == shard] % SHARD]
        return pixels if np.ndim(self._rows[which]) else pixels[0]

    @property
    def key(self) -> str:
        """Return a hash of these images."""
        return sha256(self._facts.pixels.encode() + self._rows.tobytes()).hexdigest()

    def key_with(self, labels: NDArray[np.int64]) -> str:
        """Return a hash of these images and their labels (N,)."""
        return sha256(self.key.encode() + labels.astype("<i8").tobytes()).hexdigest()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(threads())  # Pillow releases the GIL

    def _opened(self, number: int, last: int) -> Shard:
        file, *more = shard_files(self._folder, f"{number:05}", self._facts)
        ends = np.empty(0, np.int64)
        with reading(file, "prepare"):
            if more:
                content = np.memmap(file, np.uint8, "r")
            else:
                content = np.load(file, mmap_mode="r")
                if content.dtype != np.uint8 or content.shape[1:] != self.shape[1:]:
                    raise ValueError(f"{content.dtype} of shape {content.shape}")
        for ends_file in more:
            with reading(ends_file, "prepare"):
                ends = np.load(ends_file)
                if (np.diff(ends, prepend=0) < 0).any() or ends[-1] > len(content):
                    raise ValueError("invalid ends of images")
        if last >= len(ends if more else content):
            raise DataError(f"{file}: fewer images than index.csv has; run `dvc checkout --force`")
        return Shard(content, ends)

    def _decoded(self, row: int) -> Pixels:
        number, place = divmod(row, SHARD)
        content, ends = self._shards[number]
        with reading(self._folder / f"{number:05}.jpgs", "prepare"):
            file = content[ends[place - 1] if place else 0 : ends[place]].tobytes()
            try:
                found = Image.open(io.BytesIO(file), formats=("JPEG",))
                if found.size != (self._facts.size, self._facts.size):
                    raise ValueError(f"an image of {found.size} pixels")
                pixels = np.asarray(found)
            except OSError:  # which Pillow raises for any damage
                raise ValueError("no image at its place") from None
            if pixels.shape != self.shape[1:]:
                raise ValueError(f"an image of shape {pixels.shape}")
        return pixels


def shard_files(folder: Path, name: str, facts: Facts) -> list[Path]:
    """Return the files of a shard: an array, or concatenated JPEG files and the end of each."""
    if facts.storage == "raw":
        return [folder / f"{name}.npy"]
    return [folder / f"{name}.jpgs", folder / f"{name}-ends.npy"]


@contextmanager
def shard_writer(
    folder: Path, name: str, n: int, facts: Facts
) -> Iterator[Callable[[bytes], None]]:
    """Write a shard of n images; yield a function that writes the next encoded image.

    Raises OSError naming the file if the disk is full.
    """
    file, *more = shard_files(folder, name, facts)
    sizes: list[int] = []
    try:
        with file.open("wb") as out:
            if not more:
                about = {"descr": "|u1", "fortran_order": False, "shape": (n, *facts.shape)}
                np.lib.format.write_array_header_1_0(out, about)

            def write(image: bytes) -> None:
                sizes.append(len(image))
                out.write(image)

            yield write
        for ends_file in more:
            np.save(ends_file, np.cumsum(sizes, dtype=np.int64))
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(file)) from None


def encoded(pixels: Pixels, storage: Storage) -> bytes:
    """Encode an image (H, W) or (H, W, 3) as stored in a shard."""
    if storage == "raw":
        return pixels.tobytes()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()


def read_facts(prepared: Path) -> Facts:
    """Read what prepare wrote about its packed images.

    Raises DataError if prepare didn't run, or the file is damaged.
    """
    file = prepared / "facts.json"
    with reading(file, "prepare"):
        content = json.loads(file.read_text(encoding="utf-8"))
        tones = of_facts(content)
        facts = Facts(**content, tones=tones)
        known = facts.channels in (1, 3) and facts.storage in ("raw", "jpeg")
        if len(facts.classes) < 2 or facts.size < 1 or not known:
            raise ValueError(f"{facts}")
    return facts


def read_splits(
    prepared: Path, labelled: Sequence[str], others: Sequence[str] = ()
) -> tuple[list[Rows], list[Images]]:
    """Read index.csv once: the rows of the `labelled` splits, and the images of all given splits.

    The labels of the `others` aren't read; only evaluate may read those of test.

    Raises DataError if a label is not a class, if prepare didn't run, or if a file is damaged.
    """
    facts, index = read_facts(prepared), prepared / "index.csv"
    classes = {name: i for i, name in enumerate(facts.classes)}
    paths: dict[str, list[str]] = {split: [] for split in labelled}
    ids = {split: array("q") for split in (*labelled, *others)}
    labels, groups = ({split: array("q") for split in labelled} for _ in range(2))
    weights = {split: array("d") for split in labelled}
    with reading(index, "prepare"), index.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            split = row["split"]
            if split in ids:
                ids[split].append(int(row["id"]))
            if split not in paths:
                continue
            if row["label"] not in classes:
                raise DataError(f"{index}: row {row['id']} has the unknown label {row['label']!r}")
            paths[split].append(row["path"])
            labels[split].append(classes[row["label"]])
            groups[split].append(int(row["group"]))
            weights[split].append(float(row["weight"]))
    numbers = {split: np.array(found, np.int64) for split, found in ids.items()}
    rows = [
        Rows(
            numbers[split],
            paths[split],
            np.array(labels[split], np.int64),
            np.array(groups[split], np.int64),
            np.array(weights[split]),
        )
        for split in labelled
    ]
    return rows, [Images(prepared, facts, found) for found in numbers.values()]


def read_rows(prepared: Path, split: str) -> Rows:
    """Read the rows of one split, labels included. Raises DataError like `read_splits`."""
    return read_splits(prepared, [split])[0][0]


def read_images(prepared: Path, split: str) -> Images:
    """Open the images of one split without reading labels. Raises DataError like `read_splits`."""
    return read_splits(prepared, (), [split])[1][0]


def refuse_larger(stage: str, image_size: int | Literal["auto"], packed_size: int) -> None:
    """Raise ParamError if a stage's images are larger than the packed ones."""
    if image_size != "auto" and image_size > packed_size:
        raise ParamError(
            f"params.yaml: {stage}.image_size = {image_size} is more than prepare.size = "
            f"{packed_size}; raise prepare.size, or lower it"
        )
