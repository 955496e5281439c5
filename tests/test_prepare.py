"""Prepare: counts, pixels and splits against Pillow, hashlib and the published numbers."""

import csv
import hashlib
import json
import os
import shutil
import threading
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, read_params, run, write_photos
from hypothesis import given, settings, strategies
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.dataset.audit_summary import summary
from pipeline.dataset.decode import decode, decoded, header
from pipeline.dataset.split import draw, linked_groups, numbered
from pipeline.images.shards import SPLITS, read_images
from pipeline.images.tones import Tones
from pipeline.stage_runtime.errors import DataError, ParamError
from pipeline.stage_runtime.files import files_below

# The ants and bees of PyTorch's transfer-learning tutorial, where a copy is at hand.
HYMENOPTERA = Path(os.environ.get("HYMENOPTERA", ROOT / "data" / "hymenoptera"))
COLUMNS = ["id", "path", "label", "split", "group", "weight", "sha256"]

Row = dict[str, str]


def prepared(out: Path, seed: int = 0, **changes: Any) -> list[Row]:
    """Run prepare with changed params and read the rows of its index.csv."""
    run(out, read_params(prepare=changes, seed=seed), "prepare")
    return read_index(out)


def read_index(out: Path) -> list[Row]:
    with (out / "prepared" / "index.csv").open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def read_json(out: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "prepared" / name).read_text(encoding="utf-8"))
    return content


def pixels(out: Path, split: str) -> NDArray[np.uint8]:
    return read_images(out / "prepared", split)[:]


def of_split(rows: list[Row], split: str) -> list[Row]:
    return [row for row in rows if row["split"] == split]


def splits_by(rows: list[Row], column: str) -> dict[str, set[str]]:
    """Collect the splits that each value of a column is found in."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row[column], set()).add(row["split"])
    return found


# The package of solar cells


@pytest.fixture(scope="module")
def elpv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("elpv")
    run(out, read_params(prepare={"source": "elpv", "size": 16}), "prepare")
    return out


@pytest.fixture(scope="module")
def published() -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """The probability of a defect and the wafer type of every cell, as the package reads them."""
    from elpv_dataset.utils import load_dataset

    _, probabilities, types = load_dataset()
    return probabilities, types


def test_elpv_has_the_published_counts_and_weights(elpv):
    rows = read_index(elpv)
    assert Counter(row["label"] for row in rows) == {"defective": 821, "functional": 2624 - 821}
    weights = sorted({round(float(row["weight"]), 9) for row in rows})
    assert pytest.approx(weights) == [2 / 3, 1.0]


def test_elpv_labels_agree_with_the_package_itself(elpv, published):
    probabilities, _ = published
    rows = read_index(elpv)
    assert list(probabilities > 0.5) == [row["label"] == "defective" for row in rows]
    sure = np.maximum(probabilities, 1 - probabilities)
    assert sure == pytest.approx([float(row["weight"]) for row in rows])


def test_elpv_groups_are_as_many_as_the_modules_and_of_one_wafer_type(elpv, published):
    # "extracted from 44 different solar modules", says the package's own description.
    _, types = published
    wafers: dict[str, set[str]] = {}
    for wafer, row in zip(types, read_index(elpv), strict=True):
        wafers.setdefault(row["group"], set()).add(wafer)
    assert {1} == {len(found) for found in wafers.values()}
    assert len(wafers) == 44


def test_elpv_splits_hold_whole_groups_and_about_their_share(elpv):
    rows = read_index(elpv)
    assert {1} == {len(splits) for splits in splits_by(rows, "group").values()}
    sizes = Counter(row["split"] for row in rows)
    assert pytest.approx(sizes["test"] / 2624, abs=0.02) == 0.25
    assert pytest.approx(sizes["val"] / (sizes["val"] + sizes["train"]), abs=0.02) == 0.25
    for split in ("train", "val", "test"):
        defective = np.mean([row["label"] == "defective" for row in of_split(rows, split)])
        assert pytest.approx(defective, abs=0.03) == 821 / 2624


def test_elpv_cells_are_grey_and_stay_so(elpv):
    assert pixels(elpv, "val").shape[1:] == (16, 16)
    assert read_json(elpv, "facts.json")["channels"] == 1


# The files that others rely on


def test_index_names_every_file_and_its_hash(photos, tmp_path):
    rows = prepared(tmp_path, path=str(photos))
    assert list(rows[0]) == COLUMNS
    assert [str(i) for i in range(32)] == [row["id"] for row in rows]
    files = sorted(file.relative_to(photos).as_posix() for file in photos.rglob("*.png"))
    assert files == [row["path"] for row in rows]
    for row in rows:
        assert hashlib.sha256((photos / row["path"]).read_bytes()).hexdigest() == row["sha256"]
        assert row["path"].split("/")[0] == row["label"]


def test_facts_say_what_later_stages_must_know(photos, tmp_path):
    prepared(tmp_path, path=str(photos), size=32, fit="pad")
    facts = {"classes": ["class0", "class1"], "size": 32, "fit": "pad", "channels": 3}
    content = (tmp_path / "prepared/images/00000.npy").read_bytes()[-32 * 32 * 32 * 3 :]
    digest = hashlib.sha256(hashlib.sha256(content).digest()).hexdigest()
    facts |= {"storage": "raw", "pixels": digest}
    assert facts == read_json(tmp_path, "facts.json")


def test_only_the_named_files_are_left(photos, tmp_path):
    prepared(tmp_path, path=str(photos))
    names = {"index.csv", "facts.json", "audit.json", "images"}
    assert names == {file.name for file in (tmp_path / "prepared").iterdir()}


def test_classes_are_sorted_by_code_point(tmp_path):
    photos = write_photos(tmp_path / "photos", classes=4)
    names = ["Zebra", "ant", "zoo", "Ähre"]
    for i, name in enumerate(reversed(names)):
        (photos / f"class{i}").rename(photos / name)
    prepared(tmp_path, path=str(photos))
    assert names == read_json(tmp_path, "facts.json")["classes"]


def test_row_i_of_a_split_is_row_i_of_its_array(photos, tmp_path):
    rows = prepared(tmp_path, path=str(photos))
    for split in ("train", "val", "test"):
        files = [photos / row["path"] for row in of_split(rows, split)]
        direct = [Image.open(file).resize((64, 64), Image.Resampling.BICUBIC) for file in files]
        assert np.array_equal(
            np.stack([np.asarray(image) for image in direct]), pixels(tmp_path, split)
        )


# Pixels


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A picture twice as wide as high: red, white, white, blue from left to right."""
    picture = np.full((40, 80, 3), 255, np.uint8)
    picture[:, :20], picture[:, 60:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def test_squash_keeps_all_of_the_picture(wide):
    squashed = decode(wide, 40, "squash", 3)
    assert tuple(squashed[20, 2]) == (255, 0, 0)
    assert tuple(squashed[20, 20]) == (255, 255, 255)
    assert tuple(squashed[20, 37]) == (0, 0, 255)


def test_crop_keeps_the_middle_square(wide):
    assert np.array_equal(np.full((40, 40, 3), 255), decode(wide, 40, "crop", 3))


def test_pad_keeps_the_shape_between_black_borders(wide):
    padded = decode(wide, 40, "pad", 3)
    assert (0, 0, 0) == tuple(padded[2, 20]) == tuple(padded[37, 20])
    inner = Image.open(wide).resize((40, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(inner), padded[10:30])


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_every_fit_gives_a_square_of_the_size_asked_for(fit, wide):
    assert decode(wide, 33, fit, 3).shape == (33, 33, 3)
    assert decode(wide, 33, fit, 1).shape == (33, 33)


TRANSPOSED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TRANSPOSED)
def test_exif_orientation_is_applied_once(orientation, tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    upright = TRANSPOSED[orientation](stored)
    assert np.array_equal(upright, decode(tmp_path / "turned.png", 48, "squash", 3))


def test_a_jpeg_of_a_turned_camera_is_upright(wide, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side of the scene is at the bottom of what is stored
    Image.open(wide).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    stored = Image.open(tmp_path / "turned.jpg")
    turned = stored.rotate(-90, expand=True).resize((40, 40), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(turned), decode(tmp_path / "turned.jpg", 40, "squash", 3))


def saved(image: Image.Image, file: Path, **options: Any) -> Path:
    image.save(file, **options)
    return file


def test_what_is_transparent_becomes_white(tmp_path):
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[:4] = (10, 20, 30, 255)
    picture[4:] = (10, 20, 30, 0)
    file = saved(Image.fromarray(picture), tmp_path / "clear.png")
    flat = decode(file, 8, "squash", 3)
    assert tuple(flat[1, 4]) == (10, 20, 30)
    assert tuple(flat[6, 4]) == (255, 255, 255)


def test_grey_with_transparency_becomes_white_there_and_stays_grey(tmp_path):
    picture = np.full((8, 8, 2), 40, np.uint8)
    picture[:4, :, 1], picture[4:, :, 1] = 255, 0
    file = saved(Image.fromarray(picture, "LA"), tmp_path / "clear.png")
    assert header(file).grey
    flat = decode(file, 8, "squash", 1)
    assert (flat[1, 4], flat[6, 4]) == (40, 255)


def test_a_palette_is_looked_up(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    flat = decode(saved(image, tmp_path / "palette.png"), 8, "squash", 3)
    assert {(200, 100, 50)} == set(map(tuple, flat.reshape(-1, 3)))


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    file = saved(image, tmp_path / "palette.png", transparency=1)
    assert (decode(file, 8, "squash", 3) == 255).all()


def test_four_inks_become_three_lights(tmp_path):
    file = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "inks.tif")
    assert {(255, 0, 0)} == set(map(tuple, decode(file, 8, "squash", 3).reshape(-1, 3)))


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind, tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    image = Image.fromarray(np.broadcast_to(ramp, (256, 256)).copy())
    file = saved(image, tmp_path / f"deep.{kind}")
    assert header(file).grey
    assert np.array_equal(np.arange(256), decode(file, 256, "squash", 1, Tones(0, 65535))[0])


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_grey_is_scaled_by_its_range(top, tmp_path):
    ramp = np.linspace(0, top, 256, dtype=np.float32)
    image = Image.fromarray(np.broadcast_to(ramp, (256, 256)).copy())
    flat = decode(saved(image, tmp_path / "float.tif"), 256, "squash", 1, Tones(0, top))
    assert np.array_equal(np.arange(256), flat[0])


def test_one_bit_becomes_black_and_white(tmp_path):
    bits = np.indices((8, 8)).sum(0) % 2 == 0
    file = saved(Image.fromarray(bits), tmp_path / "bits.png")
    assert header(file).grey
    assert np.array_equal(255 * bits, decode(file, 8, "squash", 1))


def test_grey_pictures_are_packed_without_a_channel(tmp_path):
    photos = write_photos(tmp_path / "photos", grey=True)
    prepared(tmp_path, path=str(photos))
    assert pixels(tmp_path, "train").ndim == 3
    assert read_json(tmp_path, "facts.json")["channels"] == 1


def test_one_coloured_picture_makes_all_of_them_three_channels(tmp_path):
    photos = write_photos(tmp_path / "photos", grey=True)
    Image.new("RGB", (48, 48), "red").save(photos / "class0" / "red.png")
    prepared(tmp_path, path=str(photos))
    train = pixels(tmp_path, "train")
    assert train.shape[1:] == (64, 64, 3)
    assert read_json(tmp_path, "facts.json")["channels"] == 3
    grey = (train == train[..., :1]).all((1, 2, 3))
    assert len(grey) - 1 <= grey.sum()


# What is listed


def test_suffixes_count_in_any_case(photos, tmp_path):
    for file in photos.rglob("*0.png"):
        file.rename(file.with_suffix(".PNG"))
    assert len(prepared(tmp_path, path=str(photos))) == 32


def test_names_may_hold_spaces_commas_and_letters_of_any_script(photos, tmp_path):
    (photos / "class0").rename(photos / "Ameise, große")
    (photos / "class1").rename(photos / "蜜蜂")
    (photos / "蜜蜂" / "000.png").rename(photos / "蜜蜂" / 'a "b" ñ, 1.png')
    rows = prepared(tmp_path, path=str(photos))
    assert Counter(row["label"] for row in rows) == {"Ameise, große": 16, "蜜蜂": 16}
    assert all((photos / row["path"]).is_file() for row in rows)
    assert list(read_json(tmp_path, "audit.json")["classes"]) == ["Ameise, große", "蜜蜂"]


def test_hidden_files_and_folders_are_passed_over(photos, tmp_path):
    (photos / "class0" / ".DS_Store").write_text("x")
    shutil.copytree(photos / "class0", photos / "class0" / ".thumbnails")
    shutil.copytree(photos / "class0", photos / ".trash")
    assert len(prepared(tmp_path, path=str(photos))) == 32


def test_class_folders_may_be_links(photos, tmp_path):
    (photos / "class1").rename(tmp_path / "bees")
    (photos / "class1").symlink_to(tmp_path / "bees")
    rows = prepared(tmp_path, path=str(photos))
    assert Counter(row["label"] for row in rows) == {"class0": 16, "class1": 16}


def test_skipped_files_are_named_and_every_file_is_accounted_for(photos, tmp_path):
    (photos / "class0" / "notes.txt").write_text("taken in spring")
    (photos / "class1" / "moving.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    (photos / "class0" / "text.png").write_text("not a picture")
    whole = (photos / "class1" / "003.png").read_bytes()
    (photos / "class1" / "003.png").write_bytes(whole[: len(whole) // 2])
    rows = prepared(tmp_path, path=str(photos), not_images="skip")
    audit = read_json(tmp_path, "audit.json")
    video = "a video; convert it to PNG or JPEG"
    kinds = {"class0/notes.txt": "not an image", "class1/moving.mp4": video}
    assert audit["skipped_not_images"] == kinds
    assert list(audit["skipped_unreadable"]) == ["class0/text.png", "class1/003.png"]
    said = audit["skipped_unreadable"]["class1/003.png"]
    assert said.startswith("class1/003.png: can't be read as an image")  # wherever they lie
    files = {file.relative_to(photos).as_posix() for file in photos.rglob("*") if file.is_file()}
    skipped = {*audit["skipped_not_images"], *audit["skipped_unreadable"]}
    assert files == skipped | {row["path"] for row in rows}
    assert len(files) == audit["images"] + len(skipped)


def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the thread that decodes the first file of all end last."""
    later = threading.Event()

    def slow(file: Path, *how: Any) -> Any:
        if file.name == "000.png" and file.parent.name == "class0":
            later.wait(10)
        try:
            return decoded(file, *how)
        finally:
            if file.name == "001.png" and file.parent.name == "class0":
                later.set()

    monkeypatch.setattr("pipeline.dataset.pack.decoded", slow)


@pytest.mark.parametrize("not_images", ["skip", pytest.param("refuse", marks=pytest.mark.long)])
def test_unreadable_files_are_told_in_the_order_of_their_paths(
    not_images, photos, tmp_path, monkeypatch
):
    cut = ["class0/000.png", "class0/001.png", "class1/002.png"]
    for name in cut:
        (photos / name).write_bytes((photos / name).read_bytes()[:1000])
    backwards(monkeypatch)
    if not_images == "refuse":
        with pytest.raises(DataError, match=r"photos/class0/000\.png: can't be read as an image"):
            prepared(tmp_path, path=str(photos))
        return
    prepared(tmp_path, path=str(photos), not_images="skip")
    assert cut == list(read_json(tmp_path, "audit.json")["skipped_unreadable"])


@pytest.mark.parametrize("reverse", [False, True])
def test_of_two_links_to_one_folder_the_first_by_name_is_taken(
    reverse, photos, tmp_path, monkeypatch
):
    (photos / "class1").rename(tmp_path / "bees")
    for name in ("y", "x", "z"):
        (photos / name).symlink_to(tmp_path / "bees")
    scandir = os.scandir

    class Listed:
        """A folder in an order that a disk may have."""

        def __init__(self, path: Any) -> None:
            with scandir(path) as entries:
                self.entries = iter(sorted(entries, key=lambda e: e.name, reverse=reverse))

        def __enter__(self) -> "Listed":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def __next__(self) -> Any:
            return next(self.entries)

        def __iter__(self) -> Any:
            return self.entries

    monkeypatch.setattr(os, "scandir", Listed)
    assert {file.parts[0] for file in files_below(photos)} == {"class0", "x"}


def test_skipping_moves_no_pixels_to_another_row(photos, tmp_path):
    (photos / "class0" / "0000.png").write_text("not a picture")
    rows = prepared(tmp_path, path=str(photos), not_images="skip")
    for row, packed in zip(of_split(rows, "test"), pixels(tmp_path, "test"), strict=True):
        assert np.array_equal(decode(photos / row["path"], 64, "squash", 3), packed)


def test_a_class_whose_every_file_is_skipped_is_not_forgotten(tmp_path):
    photos = write_photos(tmp_path / "photos", classes=3)
    for file in (photos / "class2").iterdir():
        file.write_text("not a picture")
    with pytest.raises(DataError, match="class 'class2' has 0 training images"):
        prepared(tmp_path, path=str(photos), not_images="skip")


def test_the_audit_counts_classes_by_split_and_lists_duplicates(photos, tmp_path):
    shutil.copy(photos / "class0" / "000.png", photos / "class0" / "twin.png")
    shutil.copy(photos / "class0" / "001.png", photos / "class1" / "wrong.png")
    rows = prepared(tmp_path, path=str(photos))
    audit = read_json(tmp_path, "audit.json")
    for name in ("class0", "class1"):
        assert audit["classes"][name] == Counter(r["split"] for r in rows if r["label"] == name)
    twins, wrong = ["class0/000.png", "class0/twin.png"], ["class0/001.png", "class1/wrong.png"]
    assert {"all": [twins, wrong], "across_splits": [], "across_labels": [wrong]} == audit[
        "equal_files"
    ]


def test_the_audit_tells_the_images_sides(photos, tmp_path):
    """Pictures of 56 x 48 pixels, one of them 20 x 300, packed at 50."""
    Image.new("RGB", (20, 300)).save(photos / "class0" / "000.png")
    prepared(tmp_path, path=str(photos), size=50)
    assert read_json(tmp_path, "audit.json")["sides"] == {
        "shortest": 20,
        "median_short": 48,
        "longest": 300,
        "enlarged": 32,
    }


def test_the_audit_names_duplicates_across_given_splits(photos, tmp_path):
    given = into_splits(photos, "train", "test")
    shutil.copy(given / "train" / "class0" / "000.png", given / "test" / "class0" / "twin.png")
    prepared(tmp_path, path=str(given))
    found = read_json(tmp_path, "audit.json")["equal_files"]["across_splits"]
    assert found == [["test/class0/twin.png", "train/class0/000.png"]]


def test_copies_of_validation_and_test_images_are_left_out_of_train(photos, tmp_path, capsys):
    given = into_splits(photos, "train", "val", "test")
    copies = [("train", "val"), ("train", "test"), ("val", "test")]
    left_out = []
    for number, (one, other) in enumerate(copies):
        file = sorted((given / one / "class0").iterdir())[number]
        left_out.append(str(file.relative_to(given)))
        file.write_bytes(file.read_bytes() + bytes([number]))  # another file than all others
        shutil.copy(file, given / other / "class1" / f"twin{number}.png")
    rows = prepared(tmp_path, path=str(given), least_per_class=2)
    hashes = {split: {r["sha256"] for r in rows if r["split"] == split} for split in SPLITS}
    assert not any(hashes[one] & hashes[other] for one, other in copies)
    assert read_json(tmp_path, "audit.json")["skipped_copies"] == left_out
    assert len(rows) == 32 + 3 - 3
    assert "skipped copies: 3 (train/class0/000.png" in capsys.readouterr().out


# Splits


def into_splits(photos: Path, *names: str) -> Path:
    """Move a folder of classes into split folders that hold equal parts of each class."""
    given = photos.with_name("given")
    for folder in sorted(photos.iterdir()):
        for i, file in enumerate(sorted(folder.iterdir())):
            target = given / names[i % len(names)] / folder.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
    return given


def test_given_folders_are_the_splits(photos, tmp_path):
    given = into_splits(photos, "train", "val", "test")
    rows = prepared(tmp_path, path=str(given), test_fraction=0.5, val_fraction=0.5)
    assert all(row["path"].split("/")[0] == row["split"] for row in rows)
    assert {"class0", "class1"} == {row["label"] for row in rows}


@pytest.mark.parametrize("name", ["Val", "valid", "validation", "VALIDATION"])
def test_a_validation_folder_is_known_by_its_usual_names(name, photos, tmp_path):
    rows = prepared(tmp_path, path=str(into_splits(photos, "train", name, "test")))
    assert {(name, "val")} == {
        (row["path"].split("/")[0], row["split"]) for row in of_split(rows, "val")
    }
    assert len(of_split(rows, "val")) == 10


def test_a_missing_val_folder_is_cut_from_train(photos, tmp_path):
    given = into_splits(photos, "train", "test")
    rows = prepared(tmp_path, path=str(given), val_fraction=0.25)
    folders = {(row["path"].split("/")[0], row["split"]) for row in rows}
    assert {("train", "train"), ("train", "val"), ("test", "test")} == folders
    assert Counter(row["split"] for row in rows) == {"train": 12, "val": 4, "test": 16}


def test_a_missing_test_folder_is_cut_from_train(photos, tmp_path):
    given = into_splits(photos, "train", "val")
    rows = prepared(tmp_path, path=str(given), test_fraction=0.25)
    folders = {(row["path"].split("/")[0], row["split"]) for row in rows}
    assert {("train", "train"), ("train", "test"), ("val", "val")} == folders


def test_a_given_val_folder_can_be_the_test_split(photos, tmp_path):
    given = into_splits(photos, "train", "val")
    rows = prepared(tmp_path, path=str(given), val_as="test", val_fraction=0.25)
    folders = {(row["path"].split("/")[0], row["split"]) for row in rows}
    assert {("train", "train"), ("train", "val"), ("val", "test")} == folders


def test_without_a_test_fraction_there_is_no_test_split(photos, tmp_path):
    rows = prepared(tmp_path, path=str(photos), test_fraction=0)
    assert {"train", "val"} == {row["split"] for row in rows}
    assert pixels(tmp_path, "test").shape == (0, 64, 64, 3)


@pytest.mark.parametrize("split_by", ["image", "group"])
def test_each_image_is_in_one_of_the_test_folds(tmp_path, split_by):
    """Groups are files with the same content, of two or three images."""
    photos = write_photos(tmp_path / "photos", each=30)
    for label in range(2):
        folder = photos / f"class{label}"
        for i in range(0, 30, 3):
            shutil.copy(folder / f"{i:03d}.png", folder / f"{i:03d}copy.png")
    tested, groups = Counter(), {}
    for number in range(1, 6):
        fold = f"{number}/5"
        rows = prepared(
            tmp_path, path=str(photos), split_by=split_by, test_fold=fold, val_fraction=0.2
        )
        tested.update(row["path"] for row in of_split(rows, "test"))
        for row in rows:
            groups.setdefault(row["path"], set()).add(row["group"])
        by_group = splits_by(rows, "group")
        assert all(len(splits) == 1 for splits in by_group.values())
        counts = Counter((row["split"], row["label"]) for row in rows)
        for label in ("class0", "class1"):
            assert counts["test", label] == pytest.approx(40 / 5, abs=2)
            assert counts["val", label] == pytest.approx(32 / 5, abs=2)
    assert len(tested) == 80
    assert set(tested.values()) == {1}
    assert all(len(numbers) == 1 for numbers in groups.values())  # the same in each fold


def test_other_seeds_draw_other_folds(photos, tmp_path):
    def tests(seed: int, fold: str) -> set[str]:
        rows = prepared(tmp_path, seed, path=str(photos), test_fold=fold)
        return {row["path"] for row in of_split(rows, "test")}

    assert tests(0, "1/4") == tests(0, "1/4")
    assert tests(0, "1/4") != tests(1, "1/4")


@pytest.mark.parametrize(
    "fold", ["3", "0/10", "11/10", "1/1", "3/10 ", "-1/10", "a/b", "3/101", "1/2/3", "1.5/3", "/"]
)
def test_what_is_no_fold_is_refused(photos, tmp_path, fold):
    with pytest.raises(ParamError, match=r"prepare\.test_fold = .*such as 3/10"):
        prepared(tmp_path, path=str(photos), test_fold=fold)


def test_a_param_that_the_source_does_not_read_is_named(photos, tmp_path, capsys):
    prepared(tmp_path, path=str(photos), table="labels.csv", splits="none")
    said = capsys.readouterr().out
    assert "prepare.table: labels.csv is not used by source: folder, only by csv" in said
    assert "prepare.splits" not in said


def test_folds_of_given_test_images_or_of_too_few_are_refused(photos, tmp_path):
    with pytest.raises(DataError, match="at most 16 images of a class, are too few for 20 folds"):
        prepared(tmp_path, path=str(photos), test_fold="1/20")
    with pytest.raises(DataError, match="32 groups of images"):
        prepared(tmp_path, path=str(photos), test_fold="1/40")
    given = into_splits(photos, "train", "test")
    with pytest.raises(DataError, match="a test split already"):
        prepared(tmp_path, path=str(given), test_fold="1/4")


def test_fractions_are_of_all_then_of_the_rest(tmp_path):
    photos = write_photos(tmp_path / "photos", each=40)
    rows = prepared(tmp_path, path=str(photos), test_fraction=0.25, val_fraction=0.1)
    assert Counter(row["split"] for row in rows) == {"test": 20, "val": 6, "train": 54}


def test_a_split_by_image_holds_each_class_by_its_share(tmp_path):
    photos = write_photos(tmp_path / "photos", each=40)
    for i in range(20, 40):
        (photos / "class1" / f"{i:03d}.png").unlink()
    rows = prepared(tmp_path, path=str(photos), split_by="image", test_fraction=0.25)
    test = Counter(row["label"] for row in of_split(rows, "test"))
    assert test == {"class0": 10, "class1": 5}


def write_series(folder: Path, series: int = 8, each: int = 4) -> Path:
    """Write two classes of pictures in sub-folders that belong together."""
    photos = write_photos(folder, each=series * each)
    for label in photos.iterdir():
        for i, file in enumerate(sorted(label.iterdir())):
            target = label / f"series{i // each}" / file.name
            target.parent.mkdir(exist_ok=True)
            file.rename(target)
    return photos


@pytest.mark.parametrize("seed", range(3))
def test_a_split_by_group_never_cuts_a_sub_folder(seed, tmp_path):
    photos = write_series(tmp_path / "photos")
    rows = prepared(tmp_path, path=str(photos), seed=seed, splits="none")
    found: dict[Path, set[str]] = {}
    for row in rows:
        found.setdefault(Path(row["path"]).parent, set()).add(row["split"])
    assert 16 == len(found) == len({row["group"] for row in rows})
    assert {1} == {len(splits) for splits in found.values()}
    assert {"train", "val", "test"} == {row["split"] for row in rows}


def test_a_split_by_image_cuts_sub_folders(tmp_path):
    photos = write_series(tmp_path / "photos")
    rows = prepared(tmp_path, path=str(photos), splits="none", split_by="image")
    assert len(rows) == len({row["group"] for row in rows})


def test_equally_named_sub_folders_of_two_classes_are_two_groups(tmp_path):
    rows = prepared(tmp_path, path=str(write_series(tmp_path / "photos")), splits="none")
    assert {1} == {len({r["label"] for r in rows if r["group"] == row["group"]}) for row in rows}


@pytest.mark.parametrize("split_by", ["group", "image"])
@pytest.mark.parametrize("seed", range(3))
def test_equal_files_never_straddle_splits(split_by, seed, photos, tmp_path):
    for i in range(12):
        shutil.copy(photos / "class0" / f"{i:03d}.png", photos / "class0" / f"{i:03d}-twin.png")
    rows = prepared(tmp_path, path=str(photos), split_by=split_by, seed=seed)
    assert {1} == {len(splits) for splits in splits_by(rows, "sha256").values()}
    assert read_json(tmp_path, "audit.json")["equal_files"]["across_splits"] == []


def digests(out: Path) -> dict[str, str]:
    files = sorted(file for file in (out / "prepared").rglob("*") if file.is_file())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_same_seed_gives_the_same_bytes(photos, tmp_path, monkeypatch):
    prepared(tmp_path / "one", path=str(photos))
    monkeypatch.setenv("PIPELINE_THREADS", "3")
    prepared(tmp_path / "two", path=str(photos))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_another_seed_gives_another_split(photos, tmp_path):
    one = prepared(tmp_path / "one", path=str(photos))
    two = prepared(tmp_path / "two", path=str(photos), seed=1)
    assert [row["path"] for row in one] == [row["path"] for row in two]
    assert [row["split"] for row in one] != [row["split"] for row in two]


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_drawn_groups_are_whole_and_near_the_fraction(fraction, seed):
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(60), random.integers(1, 30, 60))
    labels = random.integers(0, 3, len(groups))
    chosen = draw(labels, np.array(groups), fraction, seed)
    for group in range(60):
        assert len(set(chosen[groups == group])) == 1
    for label in range(3):
        assert fraction == pytest.approx(chosen[labels == label].mean(), abs=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_drawn_images_are_the_fraction_of_each_class_to_one_image(seed):
    labels = np.random.default_rng(seed).choice(4, 997, p=[0.6, 0.3, 0.09, 0.01])
    chosen = draw(labels, np.arange(997), 0.15, seed)
    for label, n in Counter(labels.tolist()).items():
        assert 0.15 * n == pytest.approx(chosen[labels == label].sum(), abs=1)
    assert round(0.15 * 997) == chosen.sum()


def drawn_by_a_table(labels, groups, fraction, seed, draws):
    """The same choice by a table of groups and classes, which is large where both are many."""
    names, of = np.unique(groups, return_inverse=True)
    of = np.argsort(np.argsort(names.astype(str)))[of]
    counts = np.zeros((len(names), labels.max() + 1), np.int64)
    np.add.at(counts, (of, labels), 1)
    target = counts.sum(0) * fraction
    random = np.random.default_rng(seed)
    best, chosen = np.inf, None
    for _ in range(draws):
        order = random.permutation(len(names))
        sizes = counts[order].sum(1).cumsum()
        cut = int(np.abs(sizes[:-1] - target.sum()).argmin()) + 1
        off = (np.abs(counts[order[:cut]].sum(0) - target) / np.maximum(target, 1)).max()
        if off < best:
            best, chosen = off, np.isin(np.arange(len(names)), order[:cut])
    return chosen[of]


@settings(max_examples=100, deadline=None)
@given(data=strategies.data())
def test_groups_are_drawn_as_by_a_table_of_groups_and_classes(data):
    n = data.draw(strategies.integers(3, 200), "images")
    n_classes = data.draw(strategies.integers(1, n), "classes")
    n_groups = data.draw(strategies.integers(2, n - 1), "groups")
    seed = data.draw(strategies.integers(0, 2**16), "seed")
    fraction = data.draw(strategies.floats(0.01, 0.99), "fraction")
    random = np.random.default_rng(seed)
    labels = random.integers(0, n_classes, n)
    # Each group once, and one of them twice at least; numbers that sort otherwise as texts.
    groups = random.permutation(
        np.append(np.arange(n_groups), random.integers(0, n_groups, n - n_groups))
    )
    groups *= data.draw(strategies.sampled_from([1, 7, 10**6]), "step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.dataset.split.DRAWS", 20)
        found = draw(labels, groups, fraction, seed)
    assert drawn_by_a_table(labels, groups, fraction, seed, 20).tolist() == found.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_images_of_a_class_are_permuted_in_their_own_order(seed):
    labels = np.random.default_rng(seed).integers(0, 40, 300)
    random, expected = np.random.default_rng(seed), np.zeros(300, bool)
    found = draw(labels, np.arange(300), 0.3, seed)
    for label in range(40):
        of_class = np.flatnonzero(labels == label)
        expected[random.permutation(of_class)[: found[of_class].sum()]] = True
    assert expected.tolist() == found.tolist()


def test_many_groups_of_many_classes_take_memory_by_the_image(monkeypatch):
    """A table of these groups and classes has 400 MB."""
    monkeypatch.setattr("pipeline.dataset.split.DRAWS", 3)
    labels, groups = np.arange(100_000) % 500, np.arange(100_000)
    groups[1] = groups[0]  # a pair of near duplicates
    tracemalloc.start()
    try:
        chosen = draw(labels, groups, 0.25, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert abs(int(chosen.sum()) - 25_000) <= 1
    assert peak < 30e6


def audited(classes: dict[str, dict[str, int]]) -> dict[str, Any]:
    lists: dict[str, Any] = {f"skipped_{k}": [] for k in ("not_images", "unreadable", "copies")}
    lists |= {k: [] for k in ("elsewhere", "one_colour", "clipped", "nan", "negative")}
    lists |= {"tones": "", "transparent": 0, "levels": [0, 255]}
    found = {kind: {"all": []} for kind in ("equal_files", "near_duplicates")}
    sides = {"shortest": 9, "median_short": 9.0, "longest": 9, "enlarged": 0}
    return {"layout": [], "classes": classes, "sides": sides, **lists, **found}


def test_a_few_classes_have_a_line_each_and_many_one_for_all():
    few = {f"c{i:03}": {"train": 8 + i, "val": 2} for i in range(20)}
    lines = summary(audited(few))
    assert len(lines) == 21
    assert lines[3] == "c003             11 train, 2 val"
    many = {f"c{i:03}": {"train": 8 + i % 5, "val": 2} for i in range(500)}
    for i in range(0, 500, 5):
        del many[f"c{i:03}"]["val"]
    assert summary(audited(many))[:-1] == [
        "500 classes: 8 to 12 train, 0 to 2 val",
        "no c000, c005, c010, ... (100 classes) in val: how well they are recognised is not "
        "measured there",
    ]


def test_one_group_cannot_be_drawn_from():
    with pytest.raises(ValueError, match="one group only"):
        draw(np.zeros(3, np.int64), np.zeros(3, np.int64), 0.5, 0)


def test_ties_chain_and_empty_names_tie_nothing():
    names = (["a", "a", "b", "c", "d", "e"], ["", "x", "x", "", "", "y"])
    numbers = linked_groups(*map(numbered, names)).tolist()
    assert numbers[0] == numbers[1] == numbers[2]
    assert len(set(numbers)) == 4


# Real photographs


needs_hymenoptera = pytest.mark.skipif(
    not HYMENOPTERA.is_dir(), reason=f"the ants and bees of the tutorial aren't at {HYMENOPTERA}"
)


@needs_hymenoptera
def test_the_gif_among_the_ants_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"train/ants/imageNotFound\.gif: a GIF among other"):
        prepared(tmp_path, path=str(HYMENOPTERA), val_as="test")


@needs_hymenoptera
def test_ants_and_bees_have_the_published_counts(tmp_path):
    rows = prepared(tmp_path, path=str(HYMENOPTERA), val_as="test", not_images="skip", size=16)
    assert len(of_split(rows, "train")) + len(of_split(rows, "val")) == 244
    assert len(of_split(rows, "test")) == 153
    assert read_json(tmp_path, "facts.json")["classes"] == ["ants", "bees"]
    skipped = read_json(tmp_path, "audit.json")["skipped_not_images"]
    assert list(skipped) == ["train/ants/imageNotFound.gif"]
    row = of_split(rows, "test")[0]
    direct = ImageOps.exif_transpose(Image.open(HYMENOPTERA / row["path"])).convert("RGB")
    squashed = np.asarray(direct.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(squashed, pixels(tmp_path, "test")[0])
