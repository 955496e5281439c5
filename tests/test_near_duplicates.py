"""Near duplicates: altered copies of one picture are found, and other pictures aren't."""

import io

import numpy as np
import pytest
from conftest import write_photos
from PIL import Image
from test_prepare import HYMENOPTERA, prepared, read_json, splits_by

from pipeline.dataset import near_duplicates as alike
from pipeline.dataset.decode import decode
from pipeline.dataset.near_duplicates import clusters, hashes_of, near_duplicates

SIZE = 64


def scene(seed: int) -> Image.Image:
    """A picture of its own: smooth random blobs, as photographs have more low than high tones."""
    random = np.random.default_rng(seed)
    blobs = Image.fromarray(random.integers(30, 210, (6, 6, 3)).astype(np.uint8))
    return blobs.resize((200, 160), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(out)


ALTER = {
    "compressed": lambda im: jpeg(im, 25),
    "smaller": lambda im: im.resize((80, 64)),
    "brighter": lambda im: Image.eval(im, lambda v: min(255, int(v * 1.08))),
    "grey": lambda im: im.convert("L").convert("RGB"),
    "framed anew": lambda im: im.resize((300, 200)),
}


def packed(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(im.resize((SIZE, SIZE))) for im in images])


def found_in(images: np.ndarray) -> np.ndarray:
    return near_duplicates(images, hashes_of(images))


@pytest.mark.parametrize("alter", ALTER)
def test_an_altered_copy_is_found_and_nothing_else(alter):
    originals = [scene(i) for i in range(100)]
    found = found_in(packed([*originals, *map(ALTER[alter], originals)]))
    assert {(int(i), int(j)) for i, j in found} == {(i, i + 100) for i in range(100)}


@pytest.mark.parametrize("at_once", [1, 7, 10**6])
def test_hashes_that_are_close_are_found_as_by_comparing_all(at_once, monkeypatch):
    monkeypatch.setattr(alike, "AT_ONCE", at_once)
    random = np.random.default_rng(at_once)
    seeds = random.integers(0, 2**63, 20, np.uint64)
    # Each with up to twelve bits flipped, wherever they are; some in one band alone.
    flips = [random.choice(64 if i % 3 else 16, i % 13, replace=False) for i in range(400)]
    altered = [
        seeds[i % 20] ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64))
        for i, bits in enumerate(flips)
    ]
    hashes = np.unique(np.array(altered, np.uint64))
    i, j = np.triu_indices(len(hashes), 1)
    close = np.bitwise_count(hashes[i] ^ hashes[j]) <= 7
    expected = set(zip(i[close].tolist(), j[close].tolist(), strict=True))
    found = np.concatenate(list(alike._close(hashes)))
    assert len(expected) > 500
    assert expected == {(min(pair), max(pair)) for pair in found.tolist()}


def test_clusters_are_chains_and_flat_pictures_are_no_copies_of_each_other():
    a, b = scene(0), scene(1)
    flat = [Image.new("RGB", (9, 9), colour) for colour in ("black", "black", "white")]
    images = packed([a, b, jpeg(a, 30), jpeg(a, 60), *flat])
    names = clusters(images, hashes_of(images))
    assert names[0] == names[2] == names[3] >= 0
    assert [names[i] for i in (1, 4, 5, 6)] == [-1] * 4
    assert clusters(np.empty((0, SIZE, SIZE), np.uint8), np.empty(0, np.uint64)).tolist() == []


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_never_straddle_splits_unless_split_by_image(tmp_path, seed):
    folder = write_photos(tmp_path / "photos")
    for i in range(16):
        again = Image.open(folder / "class0" / f"{i:03d}.png")
        again.convert("RGB").save(folder / "class0" / f"{i:03d} copy.jpg", quality=90)
    rows = prepared(tmp_path, path=str(folder), split_by="group", seed=seed)
    assert {1} == {len(splits) for splits in splits_by(rows, "group").values()}
    group = {row["path"]: row["group"] for row in rows}
    for i in range(16):
        assert group[f"class0/{i:03d}.png"] == group[f"class0/{i:03d} copy.jpg"]
    assert read_json(tmp_path, "audit.json")["near_duplicates"]["across_splits"] == []
    prepared(tmp_path / "b", path=str(folder), split_by="image", seed=seed)
    found = read_json(tmp_path / "b", "audit.json")["near_duplicates"]
    assert len(found["all"]) == 16
    assert found["across_splits"]
    assert found["across_labels"] == []


@pytest.mark.skipif(not HYMENOPTERA.is_dir(), reason="no copy of the ants and bees at hand")
def test_no_two_of_the_ants_and_bees_are_alike_and_their_copies_are():
    files = sorted(HYMENOPTERA.glob("val/*/*.jpg"))
    images = np.stack([decode(file, 96, "squash", 3) for file in files])
    assert not len(found_in(images))
    again = np.stack([np.asarray(jpeg(Image.fromarray(image), 40)) for image in images])
    found = found_in(np.concatenate([images, again]))
    assert (found[:, 1] - found[:, 0] == len(files)).all()
    assert len(found) >= 0.98 * len(files)
