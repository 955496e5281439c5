"""The scripts behind the figures: what they write is what they were given."""

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.advice.prior_results import PriorResult
from pipeline.dataset.sources import elpv, folder
from pipeline.nets.torchvision_import import torchvision


def script(name):
    """Import a script of runs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "runs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits_are_scikit_learns_in_a_folder_a_class(tmp_path):
    script("sets").digits(tmp_path / "digits")
    found = load_digits()
    items = folder(tmp_path / "digits").items
    assert len(items) == len(found.target)
    for item in items[::100]:
        number = int(Path(item.path).stem)
        assert item.label == str(found.target[number])
        pixels = np.asarray(Image.open(tmp_path / "digits" / item.path))
        assert np.abs(pixels / 255 * 16 - found.images[number]).max() < 0.1


def test_wafers_are_the_solar_cells_by_wafer_and_module(tmp_path):
    script("sets").wafers(tmp_path / "wafers")
    groups = {Path(item.path).name: item.group for item in elpv().items}
    items = folder(tmp_path / "wafers").items
    assert {Path(i.path).name: i.group.partition("/")[2] for i in items} == groups
    assert {item.label for item in items} == {"mono", "poly"}


def test_emoji_are_those_that_every_vendor_has(tmp_path):
    listed = [
        {"category": c, "unified": u, "image": f"{u}.png", "has_img_a": True, "has_img_b": b}
        for c, u, b in (("Flags", "1", True), ("Food", "2", False), ("Component", "3", True))
    ]
    for vendor in "ab":
        images = tmp_path / vendor / "img" / vendor / "64"
        images.mkdir(parents=True)
        (tmp_path / vendor / "emoji.json").write_text(json.dumps(listed))
        for entry in listed:
            Image.new("RGB", (8, 8)).save(images / entry["image"])
    script("sets").emoji(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
    items = folder(tmp_path / "out").items
    assert [(i.path, i.label, i.group) for i in items] == [
        ("Flags/1/a.png", "Flags", "Flags/1"),
        ("Flags/1/b.png", "Flags", "Flags/1"),
    ]


@pytest.mark.parametrize("gzipped", [True, False])
def test_mnist_is_read_as_torchvision_reads_it(tmp_path, gzipped):
    generator = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", 30), ("t10k", 20)):
        pixels = generator.integers(0, 256, (n, 5, 7), np.uint8)
        for name, kind, array in (
            ("images-idx3", 3, pixels),
            ("labels-idx1", 1, np.arange(n, dtype=np.uint8) % 3),
        ):
            sizes = b"".join(size.to_bytes(4) for size in array.shape)
            data = bytes((0, 0, 8, kind)) + sizes + array.tobytes()
            (raw / f"{prefix}-{name}-ubyte").write_bytes(data)
            if gzipped:
                (raw / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(data))
    theirs = {
        s: torchvision.datasets.MNIST(tmp_path, train=s == "train") for s in ("train", "test")
    }
    if gzipped:
        for file in raw.glob("*-ubyte"):
            file.unlink()
    script("sets").first_of_each(tmp_path / "out", raw, "abc", train=4, test=2)
    items = folder(tmp_path / "out").items
    assert len(items) == 3 * 4 + 3 * 2
    for item in items:
        image, label = theirs[item.split][int(Path(item.path).stem)]
        assert item.label == "abc"[label]
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / item.path)), image)


def line(name, seed, gain):
    """A run's line in results.csv."""
    return {
        **{
            "name": name,
            "seed": seed,
            "case": 1,
            "images": 100 + seed,
            "minutes": 1.0,
            "chosen": "probe",
        },
        **{"probe_linear": 0.8 + seed / 1000, "probe": 0.8, "stage1": 0.8, "stage2": 0.8 + gain},
        **{"gain_accuracy": gain, "gain_low": gain - 0.1, "gain_high": gain + 0.1},
        **{"cv_probe_linear": 0.8, "cv_probe": 0.8},
        **{
            "early": gain,
            "late": 0.8 + gain,
            "source_confidence": gain,
            "source_information": gain,
        },
    }


def test_a_run_done_again_takes_the_place_of_its_line(tmp_path, monkeypatch):
    seeds = script("seeds")
    monkeypatch.setattr(seeds, "RESULTS", tmp_path / "results.csv")
    for name, seed, gain in (("b", 10, 0.1), ("b", 9, 0.2), ("a", 0, 0.3), ("b", 10, 0.4)):
        seeds.keep(line(name, seed, gain))
    rows = [row.split(",") for row in (tmp_path / "results.csv").read_text().splitlines()]
    gain = rows[0].index("gain_accuracy")
    assert [(row[0], row[1], row[gain]) for row in rows[1:]] == [
        ("a", "0", "0.3000"),
        ("b", "9", "0.2000"),
        ("b", "10", "0.4000"),
    ]


def test_the_table_expects_nothing_from_the_runs_own_data(tmp_path, monkeypatch, capsys):
    """Sets of the same gain in log-odds: what is expected is that gain, whatever the others say."""
    seeds, known = script("seeds"), script("known")
    for module in (seeds, known):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results.csv")
    alike = [PriorResult(name, 100, 0.8, 0.9) for name in ("x", "y")]
    monkeypatch.setattr(known, "PUBLISHED", alike)
    monkeypatch.setattr(known, "OURS", [PriorResult("two-few", 100, 0.8, 0.1)])
    for name, seed, gain in (("one", 0, 0.05), ("two", 0, 0.09), ("two", 2, 0.11)):
        seeds.keep(line(name, seed, gain))
    monkeypatch.setattr(known, "OURS", [PriorResult("two-few", 100, 0.8, 0.9)])
    known.main()
    said = capsys.readouterr().out
    assert "| one | 1 | 1 | 100 | 0.800 | 0.850 | +10.0 (+10.0 to +10.0) | +5.0 (-5.0 to" in said
    monkeypatch.setattr(known, "OURS", [PriorResult("two-few", 100, 0.8, 0.1)])
    known.main()
    said = capsys.readouterr().out
    assert "| two | 2 | 1 | 101 | 0.800 | 0.900 | +10.0 (+10.0 to +10.0) | +10.0 ± 1.4 | " in said
    assert 'PriorResult("two", 101, 0.801, 0.900)' in said


@pytest.mark.parametrize("name", sorted(script("seeds").SETTINGS))
def test_settings_name_params_that_there_are(name):
    import yaml

    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for change in script("seeds").SETTINGS[name]:
        value = params
        for part in change.partition("=")[0].split("."):
            assert part in value
            value = value[part]
