"""Packed images: shards hold what was decoded, raw or as JPEG, and none is decoded twice."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call, read_params, run, write_photos
from PIL import Image
from test_prepare import prepared, read_index
from test_resume import Killed, contents

from pipeline.dataset import pack as packing
from pipeline.dataset.decode import decode, decoded
from pipeline.images import shards as pack
from pipeline.images.shards import SPLITS, read_images, read_rows
from pipeline.prepare import prepare
from pipeline.stage_runtime.errors import DataError
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import arguments


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pack, packing):
        monkeypatch.setattr(module, "SHARD", 5)


def as_jpeg(pixels: np.ndarray) -> np.ndarray:
    """What is left of an image that was a JPEG file in between."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("storage", ["raw", "jpeg"])
def test_every_split_has_the_images_that_index_csv_says(storage, grey, tmp_path):
    photos = write_photos(tmp_path / "photos", grey=grey)
    rows = prepared(tmp_path, path=str(photos), size=48, storage=storage)
    for split in SPLITS:
        files = [photos / row["path"] for row in rows if row["split"] == split]
        shown = [decode(file, 48, "squash", 1 if grey else 3) for file in files]
        expected = np.stack([as_jpeg(one) for one in shown] if storage == "jpeg" else shown)
        images = read_images(tmp_path / "prepared", split)
        assert images.shape == expected.shape
        assert len(images) == len(expected)
        np.testing.assert_array_equal(images[:], expected)
        chosen = np.random.default_rng(0).permutation(len(expected))[:6].repeat(2)
        np.testing.assert_array_equal(images[chosen], expected[chosen])
        np.testing.assert_array_equal(images[3], expected[3])
        np.testing.assert_array_equal(images[np.int64(2)], expected[2])
        assert images[chosen[:0]].shape == (0, *expected.shape[1:])


def test_jpeg_takes_less_room_and_looks_the_same(tmp_path):
    photos = write_photos(tmp_path / "photos")
    sizes, images = {}, {}
    for storage in ("raw", "jpeg"):
        prepared(tmp_path / storage, path=str(photos), size=128, storage=storage)
        folder = tmp_path / storage / "prepared"
        sizes[storage] = sum(file.stat().st_size for file in (folder / "images").iterdir())
        images[storage] = read_images(folder, "train")[:].astype(float)
    assert sizes["jpeg"] < sizes["raw"] / 2
    assert abs(images["jpeg"] - images["raw"]).mean() < 3


def test_images_left_out_keep_their_place(tmp_path):
    photos = write_photos(tmp_path / "photos")
    for name in ("003", "009"):
        (photos / "class0" / f"{name}.png").write_bytes(b"no image")
    for storage in ("raw", "jpeg"):
        rows = prepared(
            tmp_path / storage, path=str(photos), not_images="skip", size=48, storage=storage
        )
        assert [int(row["id"]) for row in rows] == [i for i in range(32) if i not in (3, 9)]
        own = [row for row in rows if row["split"] == "train"]
        found = read_images(tmp_path / storage / "prepared", "train")[:]
        for row, image in zip(own, found, strict=True):
            expected = decode(photos / row["path"], 48, "squash", 3)
            expected = as_jpeg(expected) if storage == "jpeg" else expected
            np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("storage", ["raw", "jpeg"])
def test_a_killed_run_goes_on_at_the_shard_where_it_was(storage, photos, tmp_path, monkeypatch):
    params = read_params(prepare={"path": str(photos), "storage": storage})
    call("prepare", {"out": tmp_path / "expected"}, params)
    seen: list[Path] = []

    def watched(file: Path, *how: Any) -> Any:
        if len(seen) == 17:
            raise Killed
        seen.append(file)
        return decoded(file, *how)

    monkeypatch.setattr(packing, "decoded", watched)
    monkeypatch.setattr(packing, "AT_ONCE", 1)
    monkeypatch.setenv("PIPELINE_THREADS", "1")
    given = arguments(prepare, params)
    with pytest.raises(Killed):
        prepare(out=tmp_path / "out", **given, resume=Resume(tmp_path / "state"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(packing, "decoded", lambda *how: seen.append(how[0]) or decoded(*how))
    prepare(out=tmp_path / "out", **given, resume=Resume(tmp_path / "state"))
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    # Three shards of five were whole; of the fourth two images were, which are decoded again.
    assert len(seen) == 32 + 2
    assert len(set(seen)) == 32


def damage_ends(folder: Path) -> None:
    ends = np.load(folder / "00000-ends.npy")
    np.save(folder / "00000-ends.npy", ends[::-1])


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (damage_ends, "00000-ends.npy: damaged (ValueError: invalid ends of images"),
        (lambda f: (f / "00000-ends.npy").unlink(), "00000-ends.npy: no such file"),
        (lambda f: (f / "00000.jpgs").write_bytes(b""), "00000.jpgs: damaged"),
        (
            lambda f: (f / "00000.jpgs").write_bytes(b"x" * 99_999),
            "damaged (ValueError: no image",
        ),
        (lambda f: (f / "00006.jpgs").unlink(), "00006.jpgs: no such file; run `dvc repro prep"),
    ],
)
def test_a_damaged_shard_of_jpeg_is_named(damage, line, photos, tmp_path):
    prepared(tmp_path, path=str(photos), storage="jpeg")
    damage(tmp_path / "prepared" / "images")
    with pytest.raises(DataError) as caught:
        [read_images(tmp_path / "prepared", split)[:] for split in SPLITS]
    assert line in str(caught.value)


def test_a_shard_with_fewer_images_than_the_index_says_is_named(photos, tmp_path):
    prepared(tmp_path, path=str(photos))
    file = tmp_path / "prepared" / "images" / "00001.npy"
    np.save(file, np.load(file)[:1])
    with pytest.raises(DataError, match=r"00001\.npy: fewer images than index\.csv has; run"):
        [read_images(tmp_path / "prepared", split) for split in SPLITS]


def test_the_key_of_images_tells_pixels_and_rows_apart(photos, tmp_path):
    keys = set()
    for name, changes in (("a", {}), ("b", {"fit": "crop"})):
        prepared(tmp_path / name, path=str(photos), **changes)
        keys |= {read_images(tmp_path / name / "prepared", split).key for split in SPLITS}
    assert len(keys) == 6
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert read_images(tmp_path / "c" / "prepared", "val").key in keys


def test_all_stages_run_on_jpeg(tmp_path):
    write_photos(tmp_path / "photos")
    params = read_params(prepare={"path": str(tmp_path / "photos"), "storage": "jpeg"})
    run(tmp_path, params)
    assert len(read_index(tmp_path)) == 32
    assert len(read_rows(tmp_path / "prepared", "val").ids) == len(
        read_images(tmp_path / "prepared", "val")
    )
    assert (tmp_path / "models" / "final" / "model.safetensors").exists()
