"""Damaged images, params, index files and checkpoints: used as they are, or refused in one line.

`pytest --fuzz N` tries N times as many; what they once found stands in the tests of its own kind.
"""

import io
import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import STAGES, call, paths, read_params
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.dataset.decode import decode, header
from pipeline.dataset.sources import elpv
from pipeline.final_model import classifier
from pipeline.images.shards import SPLITS, read_facts, read_images, read_rows
from pipeline.nets import checkpoint
from pipeline.nets.network import load
from pipeline.probing.codes import read_feature_facts, read_labels
from pipeline.probing.probes import read_probes
from pipeline.stage_runtime.errors import CheckpointError, DataError, ParamError, PipelineError
from pipeline.stage_runtime.schema import arguments
from pipeline.stage_runtime.schema import read_params as read_params_file

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's about damage

TREES = 25  # of folders
IMAGES = 500  # of which each kind of file has its share
FILES = 100
PARAMS = 100
LONGEST = 20.0  # seconds for one file
MODES = {"JPEG": ("RGB",), "PPM": ("RGB", "L", "1")}  # where not all
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


@pytest.fixture
def more(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fuzz"))


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Change bytes as bad disks, cut-off copies and attackers do."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        if not data:
            break
        at = (
            chance.randrange(len(data))
            if chance.random() < 0.5
            else chance.randrange(min(len(data), 256))
        )
        how = chance.randrange(7)
        if how == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif how == 2:
            del data[at:]
        elif how == 3:
            del data[at : at + chance.randrange(1, 64)]
        elif how == 4:
            data[at:at] = data[at : at + chance.randrange(1, 512)]
        elif how == 5:
            data[at : at + 4] = struct.pack(
                chance.choice("<>") + "I", chance.choice((0, 1, 100_000, 2**31 - 1, 2**32 - 1))
            )
        else:
            data[at : at + 16] = chance.randbytes(16)
    return bytes(data)


def real_images(chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Give real photographs in several formats, without end."""
    found = elpv()
    while True:
        item, kind = chance.choice(found.items), chance.choice(FORMATS)
        image = Image.open(found.folder / item.path).resize((96, 64))
        if chance.random() < 0.5:
            image = image.convert(chance.choice(MODES.get(kind, ("RGB", "L", "1", "P"))))
        out = io.BytesIO()
        image.save(out, kind)
        yield kind.lower(), out.getvalue()


def test_damaged_images_decode_or_are_refused_in_a_line(more, tmp_path):
    chance, refused = random.Random(0), 0
    images = real_images(chance)
    for _ in range(IMAGES * more):
        kind, content = next(images)
        file = tmp_path / f"image.{kind}"
        file.write_bytes(mutated(content, chance))
        start = time.monotonic()
        try:
            header(file)
            pixels = decode(file, 32, "pad", 3)
        except DataError as error:
            assert "\n" not in str(error)
            assert str(file) in str(error)
            refused += 1
        else:
            assert pixels.shape == (32, 32, 3)
            assert pixels.dtype == np.uint8
        assert time.monotonic() - start < LONGEST
    assert 0.1 < refused / (IMAGES * more) < 0.95  # neither all broken nor none


def test_no_damaged_image_is_dropped_in_silence(photos, tmp_path):
    chance = random.Random(1)
    images = real_images(chance)
    names = set()
    for i in range(60):
        kind, content = next(images)
        file = photos / "class0" / f"damaged{i}.{'jpg' if kind == 'jpeg' else kind}"
        file.write_bytes(mutated(content, chance))
        names.add(f"class0/{file.name}")
    params = read_params(prepare={"path": str(photos), "not_images": "skip"})
    call("prepare", paths(tmp_path)["prepare"], params)
    prepared = tmp_path / "prepared"
    listed = {path for split in SPLITS for path in read_rows(prepared, split).paths}
    audit = json.loads((prepared / "audit.json").read_text())
    skipped = {*audit["skipped_unreadable"], *audit["skipped_not_images"]}
    assert names <= listed | skipped
    assert not listed & skipped
    assert len(listed) + len(skipped) == 32 + 60


NAMES = [
    *("cats", "dogs", "train", "Training", "test_set", "val", "p1", "p2", "a b", "größe", "größe"),
    *("__MACOSX", "-x", "=1", "CON", "images", "0", "日本", ".hidden", "x" * 80),
]
ENDS = ["png", "jpg", "PNG", "tif", "gif", "txt", "", "csv", "heic", "jpeg", "db", "avif"]


def grown(folder: Path, chance: random.Random, pictures: list[tuple[str, bytes]]) -> set[str]:
    """Write a tree of folders and files as nobody plans it; gives all files that aren't hidden."""
    written = set()
    wild = chance.random() < 0.5
    folders = [folder] if wild else []
    for _ in range(chance.randint(1, 12) if wild else 3):
        here = chance.choice(folders or [folder]) if wild else folder
        here = here / chance.choice(NAMES if wild else NAMES[:2] + NAMES[6:10])
        here.mkdir(exist_ok=True)
        folders.append(here)
    for i in range(chance.randint(0, 60) if wild else 60):
        here = chance.choice(folders)
        file = here / f"f{i}.{chance.choice(ENDS)}".removesuffix(".")  # no folder is called so
        kind = chance.random()
        if kind < 0.6:
            noise = bytes(chance.randrange(256) for _ in range(256))
            Image.frombytes("L", (16, 16), noise).save(file, "PNG")
        elif kind < 0.8:
            file.write_bytes(chance.choice(pictures)[1])
        elif kind < 0.9:
            file.write_bytes(bytes(chance.randrange(256) for _ in range(chance.randrange(200))))
        elif kind < 0.95:
            os.mkfifo(file)
        else:
            file.symlink_to(chance.choice(["nowhere", ".", "..", file.name]))
        written.add(file)
    links = {f for f in written if f.is_symlink() and f.is_dir()}
    names = {f.relative_to(folder).as_posix() for f in written - links}
    return {name for name in names if not any(p.startswith(".") for p in name.split("/"))}


def test_all_of_any_tree_of_folders_is_used_skipped_or_refused(more, tmp_path):
    chance = random.Random(2)
    images = real_images(chance)
    pictures = [next(images) for _ in range(12)]
    used = refused = 0
    for i in range(TREES * more):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        names = grown(folder, chance, pictures)
        shares = {"least_per_class": 2, "val_fraction": 0.3, "test_fraction": 0.0}
        params = read_params(
            prepare={"path": str(folder), "not_images": "skip", "size": 16, **shares},
            probe={"folds": 2},
        )
        ways = paths(tmp_path / f"out{i}")["prepare"]
        try:
            call("prepare", ways, params)
        except (DataError, ParamError) as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        audit = json.loads((ways["out"] / "audit.json").read_text())
        rows = {path for split in SPLITS for path in read_rows(ways["out"], split).paths}
        rows = {path.removeprefix("./") for path in rows}
        skipped = {*audit["skipped_unreadable"], *audit["skipped_not_images"]}
        skipped |= set(audit["skipped_copies"])
        assert names <= rows | skipped
        assert not rows & skipped
        used += 1
    assert used > 0
    assert refused > 0


# Params

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def several(n: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def test_any_value_of_any_param_is_used_or_named(more):
    params = read_params()
    keys = [(s, k) for s, keys in params.items() if isinstance(keys, dict) for k in keys]
    keys += [(s, "") for s in params]

    @several(PARAMS * more)
    @given(st.sampled_from(sorted(STAGES)), st.sampled_from(keys), anything)
    def check(stage: str, key: tuple[str, str], value: Any) -> None:
        section, name = key
        changed = {**params, section: {**params[section], name: value} if name else value}
        try:
            taken = arguments(STAGES[stage], changed)
        except ParamError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 1000
        else:
            assert "resume" not in taken

    check()


def test_damaged_params_files_are_read_or_refused_in_a_line(more, tmp_path):
    chance, file = random.Random(2), tmp_path / "params.yaml"
    content = yaml.safe_dump(read_params()).encode()
    for _ in range(PARAMS * more):
        file.write_bytes(mutated(content, chance))
        try:
            params = read_params_file(file)
            for stage in STAGES.values():
                arguments(stage, params)
        except ParamError as error:
            assert "\n" not in str(error)


# What stages wrote


def damaged(
    file: Path,
    chance: random.Random,
    read: Callable[[], object],
    kinds: type[PipelineError],
    n: int,
) -> int:
    """Damage a file so often and read it; gives how often it was refused."""
    content, refused = file.read_bytes(), 0
    for _ in range(n):
        file.write_bytes(mutated(content, chance))
        try:
            read()
        except kinds as error:
            assert "\n" not in str(error)
            refused += 1
    file.write_bytes(content)
    return refused


def test_damaged_index_files_are_read_or_refused_in_a_line(more, finished, tmp_path):
    prepared = shutil.copytree(paths(finished)["prepare"]["out"], tmp_path / "prepared")
    features = shutil.copytree(paths(finished)["extract"]["out"], tmp_path / "features")
    chance, n = random.Random(3), FILES * more
    cases: list[tuple[Path, Callable[[], object]]] = [
        (prepared / "index.csv", lambda: [read_rows(prepared, split) for split in SPLITS]),
        (prepared / "facts.json", lambda: read_facts(prepared)),
        (prepared / "images/00000.npy", lambda: read_images(prepared, "train")[:]),
        (features / "labels.csv", lambda: read_labels(features, "train")),
        (features / "facts.json", lambda: read_feature_facts(features)),
    ]
    for file, read in cases:
        assert damaged(file, chance, read, DataError, n) > 0


def test_damaged_checkpoints_are_read_or_refused_in_a_line(more, finished, tmp_path):
    models = shutil.copytree(finished / "models", tmp_path / "models")
    chance, n = random.Random(4), FILES * more
    cases = {
        "stage1/model.safetensors": load,
        "probe/probe.safetensors": read_probes,
        "final/model.safetensors": classifier.load,
    }
    for name, read in cases.items():
        file = models / name

        def read_it(file: Path = file, read: Callable[[Path], object] = read) -> object:
            return read(file)

        assert damaged(file, chance, read_it, PipelineError, n) > 0


def test_checkpoints_with_any_metadata_are_read_or_refused_in_a_line(more, finished, tmp_path):
    tensors, meta = checkpoint.read(paths(finished)["stage2"]["stage1"])
    file = tmp_path / "other.safetensors"

    @several(FILES * more)
    @given(st.sampled_from(sorted(meta)), anything)
    def check(key: str, value: Any) -> None:
        checkpoint.write(file, tensors, {**meta, key: value})
        try:
            load(file)
        except (CheckpointError, ParamError) as error:
            assert "\n" not in str(error)

    check()
