"""Deep and transparent pictures: one range and one background for a whole set, said and kept."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import read_params, run, write_photos
from numpy.typing import NDArray
from PIL import Image
from test_prepare import of_split, pixels, prepared, read_json

from pipeline.dataset.decode import decode, decoded
from pipeline.final_model import classifier
from pipeline.final_model import onnx as portable
from pipeline.images import tones
from pipeline.images.shards import read_facts
from pipeline.images.tones import PLAIN, Seen, Tones
from pipeline.stage_runtime.errors import DataError, ParamError

Values = NDArray[np.float64]


def striped(label: int, i: int) -> Values:
    """Draw a picture of 0..1, whose class is told by the direction of its stripes."""
    random = np.random.default_rng([label, i])
    y, x = np.mgrid[:40, :40] / 3
    return np.clip(0.5 + 0.4 * np.sin(x if label else y) + random.normal(0, 0.05, (40, 40)), 0, 1)


def write(folder: Path, form: str, low: float, high: float, each: int = 16) -> Path:
    """Write striped pictures whose values go from `low` to `high`."""
    for label in (0, 1):
        for i in range(each):
            values = low + striped(label, i) * (high - low)
            if i == 0:
                values[3, 3] = {"u2": 65535, "i4": 2**30, "f4": 1e9}[form]  # a hot pixel
            file = folder / f"class{label}" / f"{i:03}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(form)).save(file)
    return folder


DEEP = [
    *(("u2", 0, 4095), ("u2", 1000, 1100), ("u2", 0, 65535), ("i4", -1000, 400)),
    *(("i4", 10**6, 10**6 + 300), ("f4", 0, 1), ("f4", -0.02, 0.03), ("f4", 250, 900)),
]


@pytest.mark.parametrize(("form", "low", "high"), DEEP)
def test_a_narrow_range_of_deep_pictures_fills_eight_bits(tmp_path, form, low, high, capsys):
    """The fault that was: twelve bits in files of sixteen became sixteen levels of grey."""
    prepared(tmp_path, path=str(write(tmp_path / "photos", form, low, high)))
    train = pixels(tmp_path, "train").astype(float)
    assert train.shape[1:] == (64, 64)
    spread = np.percentile(train, 95) - np.percentile(train, 5)
    assert spread > 150
    facts = json.loads((tmp_path / "prepared" / "facts.json").read_text())["tones"]
    width = high - low
    assert facts["low"] == pytest.approx(low, abs=0.05 * width)
    assert facts["high"] == pytest.approx(high, abs=0.05 * width)
    said = f"values {facts['low']:g} to {facts['high']:g} become 0 to 255"
    assert said in capsys.readouterr().out


def test_one_range_keeps_what_is_brighter_brighter(tmp_path):
    """Scaled one by one, a bright and a dark picture would look alike."""
    for label, top in (("dark", 500), ("light", 4000)):
        for i in range(16):
            file = tmp_path / "photos" / label / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((striped(0, i) * top).astype(np.uint16)).save(file)
    rows = prepared(tmp_path, path=str(tmp_path / "photos"))
    of = [row["label"] for row in of_split(rows, "train")]
    means = pixels(tmp_path, "train").mean((1, 2))
    dark, light = (means[[label == name for label in of]] for name in ("dark", "light"))
    assert dark.max() < 40
    assert light.min() > 100


def test_the_range_is_that_of_the_training_images(tmp_path):
    for split, top in (("train", 1000), ("test", 4000)):
        write(tmp_path / "photos" / split, "u2", 0, top)
    prepared(tmp_path, path=str(tmp_path / "photos"))
    assert read_facts(tmp_path / "prepared").tones.high == pytest.approx(1000, rel=0.05)
    audit = read_json(tmp_path, "audit.json")
    assert len(audit["clipped"]) == 32  # all of test, and no other
    assert {path.split("/")[0] for path in audit["clipped"]} == {"test"}
    # Drawn splits: that of the images that were drawn for training.
    write(tmp_path / "drawn", "u2", 0, 1000)
    rows = prepared(tmp_path / "d", path=str(tmp_path / "drawn"))
    train = [decoded_values(tmp_path / "drawn" / row["path"]) for row in of_split(rows, "train")]
    low, high = tones.range_of([tones.measured(values) for values in train])
    assert read_facts(tmp_path / "d" / "prepared").tones == Tones(low, high)


def decoded_values(file: Path) -> Values:
    return np.asarray(Image.open(file)).astype(np.float64)


def test_a_range_can_be_said(tmp_path):
    folder = write(tmp_path / "photos", "u2", 100, 900)
    prepared(tmp_path, path=str(folder), range="0..4095")
    assert read_facts(tmp_path / "prepared").tones == Tones(0, 4095)
    assert np.percentile(pixels(tmp_path, "train"), 99) < 80
    for wrong in ("0-4095", "4095..0", "nan..1", "..3", "1..inf", "a..b", "5..5"):
        with pytest.raises(ParamError, match=r"prepare.range = .*expected auto, or two numbers"):
            prepared(tmp_path, path=str(folder), range=wrong)


def test_pictures_of_eight_bits_are_never_scaled(photos, tmp_path):
    for file in photos.rglob("*.png"):
        Image.open(file).point(lambda v: v // 8).save(file)
    prepared(tmp_path, path=str(photos))
    assert pixels(tmp_path, "train").max() < 40
    assert "tones" not in json.loads((tmp_path / "prepared" / "facts.json").read_text())
    assert read_json(tmp_path, "audit.json")["levels"][1] < 32
    with pytest.raises(ParamError, match=r"prepare.range is for images with more than 8 bits"):
        prepared(tmp_path, path=str(photos), range="0..32")


def test_few_levels_are_said(photos, tmp_path, capsys):
    for file in photos.rglob("*.png"):
        Image.open(file).point(lambda v: v // 8).save(file)
    prepared(tmp_path, path=str(photos))
    assert "of 256: detail may have been lost before" in capsys.readouterr().out


def test_mixed_depths_are_refused_by_the_rarer_ones_name(photos, tmp_path):
    Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(photos / "class1" / "deep.png")
    line = r"class1/deep.png: has more than 8 bits a value, and most pictures have 8; convert it"
    with pytest.raises(DataError, match=line):
        prepared(tmp_path, path=str(photos))
    prepared(tmp_path, path=str(photos), not_images="skip")
    assert list(read_json(tmp_path, "audit.json")["skipped_unreadable"]) == ["class1/deep.png"]
    folder = write(tmp_path / "deep", "u2", 0, 4095)
    Image.new("L", (40, 40), 7).save(folder / "class0" / "shallow.png")
    with pytest.raises(DataError, match=r"shallow.png: has 8 bits a value, and most pictures have"):
        prepared(tmp_path, path=str(folder))


def ppm16(values: NDArray[np.uint16]) -> bytes:
    height, width, _ = values.shape
    return f"P6 {width} {height} 65535\n".encode() + values.astype(">u2").tobytes()


def test_colour_of_sixteen_bits_is_refused_unless_its_range_is_said(tmp_path):
    """Pillow reads the upper byte and says nothing."""
    y, x = np.mgrid[:16, :16]
    values = np.stack([x, y, x + y], 2).astype(np.uint16) * 16
    (tmp_path / "a.ppm").write_bytes(ppm16(values))
    with pytest.raises(DataError, match="has 16 bits a colour, of which the upper 8 can be read"):
        decode(tmp_path / "a.ppm", 16, "squash", 3)
    found = decode(tmp_path / "a.ppm", 16, "squash", 3, Tones(0, 65535))
    assert np.abs(found.astype(int) - values / 257).max() <= 1


def test_numbers_that_are_none_and_negatives_are_listed_by_file(tmp_path):
    folder = write(tmp_path / "photos", "f4", 0, 1)
    for name, value in (("nan.tif", np.nan), ("inf.tif", np.inf), ("below.tif", -5.0)):
        values = striped(0, 99).astype(np.float32)
        values[:4] = value
        Image.fromarray(values).save(folder / "class0" / name)
    prepared(tmp_path, path=str(folder))
    audit = read_json(tmp_path, "audit.json")
    assert audit["nan"] == ["class0/inf.tif", "class0/nan.tif"]
    assert audit["negative"] == ["class0/below.tif"]
    assert audit["clipped"] == ["class0/below.tif", "class0/inf.tif", "class0/nan.tif"]


def test_pictures_of_one_colour_are_listed(photos, tmp_path):
    Image.new("RGB", (40, 40), "navy").save(photos / "class0" / "blank.png")
    prepared(tmp_path, path=str(photos))
    found = read_json(tmp_path, "audit.json")["one_colour"]
    assert found == []  # three channels of other levels
    Image.new("RGB", (40, 40), "white").save(photos / "class0" / "blank.png")
    prepared(tmp_path, path=str(photos))
    assert read_json(tmp_path, "audit.json")["one_colour"] == ["class0/blank.png"]


# Transparency


def drawn(folder: Path, colour: int, each: int = 12) -> Path:
    """Write lines of one grey on nothing."""
    for label in (0, 1):
        for i in range(each):
            alpha = (striped(label, i) > 0.7).astype(np.uint8) * 255
            image = Image.fromarray(np.full((40, 40), colour, np.uint8))
            image.putalpha(Image.fromarray(alpha))
            file = folder / f"class{label}" / f"{colour}-{i:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    return folder


@pytest.mark.parametrize(
    ("colours", "background"),
    [([0], "white"), ([255], "black"), ([0, 255], "grey"), ([128], "white"), ([250], "black")],
)
def test_a_background_is_chosen_on_which_drawings_show(tmp_path, colours, background, capsys):
    """The fault that was: white drawings on white."""
    for colour in colours:
        drawn(tmp_path / "photos", colour)
    prepared(tmp_path, path=str(tmp_path / "photos"))
    assert read_facts(tmp_path / "prepared").tones == Tones(background=background)
    train = pixels(tmp_path, "train").astype(float)
    assert train.std((1, 2)).min() > 20
    assert f"transparent parts become {background}" in capsys.readouterr().out


def test_a_background_can_be_said(tmp_path):
    prepared(tmp_path, path=str(drawn(tmp_path / "photos", 255)), background="grey")
    assert read_facts(tmp_path / "prepared").tones.background == "grey"
    assert pixels(tmp_path, "train").min() >= 100


def test_a_few_pale_drawings_leave_the_background_white():
    seen = [Seen(contrasts=(0.9, 0.1, 0.4))] * 95 + [Seen(contrasts=(0.0, 1.0, 0.5))] * 5
    assert tones.background_of(seen) == "white"
    assert tones.background_of([Seen()]) == "white"
    assert PLAIN.facts() == {}


# From prepare to the final model


def test_the_final_model_and_onnx_scale_as_prepare_did(tmp_path, capsys):
    folder = write(tmp_path / "photos", "u2", 1000, 1400, each=20)
    params = read_params(
        prepare={"path": str(folder)},
        stage1={"epochs": 1},
        stage2={"epochs": 1},
        evaluate={"views": 1},
    )
    run(tmp_path, params)
    of_set = read_facts(tmp_path / "prepared").tones
    final = classifier.load(tmp_path / "models" / "final" / "model.safetensors")
    assert final.network.tones == of_set
    network = final.network
    file = folder / "class0" / "001.tif"
    found = decoded(file, network.packed_size, network.fit, network.channels, network.tones)
    assert found.clipped < 0.01
    assert np.ptp(found.pixels) > 150
    Image.new("L", (40, 40), 7).save(tmp_path / "shallow.png")
    with pytest.raises(DataError, match=r"has 8 bits a value, and the set's pictures more"):
        decode(tmp_path / "shallow.png", 64, "squash", 1, network.tones)
    from pipeline.final_model.graph import Graph

    portable.write(final, Graph(final), tmp_path / "model.onnx")
    assert portable.Portable(tmp_path / "model.onnx").network.tones == of_set


# Where test images come from


def test_test_images_from_elsewhere_are_told(tmp_path, capsys):
    write_photos(tmp_path / "photos" / "train")
    write_photos(tmp_path / "photos" / "test", each=8, first=50)
    folder = tmp_path / "photos"
    prepared(tmp_path / "a", path=str(folder))
    assert read_json(tmp_path / "a", "audit.json")["elsewhere"] == []
    for file in (folder / "test").rglob("*.png"):
        image = Image.open(file).convert("L").resize((200, 220)).point(lambda v: v // 2)
        image.save(file.with_suffix(".bmp"))
        file.unlink()
    prepared(tmp_path / "b", path=str(folder))
    [line] = read_json(tmp_path / "b", "audit.json")["elsewhere"]
    assert line == (
        "test images look as if from elsewhere, training images in brackets: 100% BMP (0%), 100% "
        "grey (0%), shorter side 200 (48), brightness 65 (130)"
    )
    assert line in capsys.readouterr().out
