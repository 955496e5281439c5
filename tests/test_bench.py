"""Every command of bench/ and runs/ runs, on little: what it measures then says nothing."""

import csv
import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, call, read_params, write_photos
from PIL import Image
from repository import commit, environment, python_path

from bench.networks import RECOMMENDED, row
from pipeline.images.shards import SPLITS, read_rows
from pipeline.nets.fuse import resolved

EACH = {"train": 64, "val": 24, "test": 24}  # images of the default data that are left
# Threads that wait for each other take long on a machine that does other things too.
ONE_THREAD = {"PIPELINE_THREADS": "1", "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.long


def ended(folder: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    """Run a program of Python's in a folder, however it ends."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**environment(folder), **ONE_THREAD, "PYTHONPATH": python_path(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def command(folder: Path, *words: object) -> str:
    """Run a program of Python's in a folder and give what it prints; it has to succeed."""
    done = ended(folder, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the default data and the default network, after the probe."""
    folder = tmp_path_factory.mktemp("cells")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["extract"] |= {"views": 1, "depths": ["blocks.5"]}
    params["probe"] |= {"kinds": ["linear"], "linear_c": [0.01], "folds": 2}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    prepared, features = folder / "data/prepared", folder / "data/features"
    call("prepare", {"out": prepared}, params)
    keep_some(prepared / "index.csv")
    call("extract", {"prepared": prepared, "out": features}, params)
    call("probe", {"features": features, "out": folder / "models/probe"}, params)
    return folder


def keep_some(index: Path) -> None:
    """Leave some rows of each split, from all over it."""
    with index.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    kept = []
    for split in SPLITS:
        of_split = [row for row in rows if row["split"] == split]
        kept += of_split[:: len(of_split) // EACH[split]][: EACH[split]]
    with index.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept, key=lambda row: int(row["id"])))


def test_every_command_is_run_here():
    here = Path(__file__).read_text(encoding="utf-8")
    for folder in ("bench", "runs"):
        files = (ROOT / folder).glob("*.py")
        names = [file.stem for file in files if "\ndef main() -> None:" in file.read_text("utf-8")]
        assert len(names) > 3
        for name in names:
            assert f"{folder}.{name}" in here or f"{folder}/{name}.py" in here


def test_equal(cells):
    said = command(cells, "-m", "bench.equal", "--images", 24)
    assert re.search(r"^cosine of 72 codes: median (0\.99|1\.00)", said)
    assert "linear probe: ours" in said


def test_ratios(cells):
    words = ("--rounds", 1, "--images", 32, "--times", 1, "--json", "ratios.json")
    said = command(cells, "-m", "bench.ratios", *words)
    ratios = json.loads((cells / "ratios.json").read_text())
    assert len(ratios) == (10 if resolved("auto") == "bf16" else 8)
    assert all(float(ratio) > 0 for (ratio,) in ratios.values())
    assert all(name in said for name in ratios)


@pytest.mark.parametrize("peer", ["tutorial", "fastai", "lightning"])
def test_peers(peer, cells):
    if peer != "tutorial":
        pytest.importorskip(peer, reason=f"{peer} isn't here; `make bench` installs it")
    said = command(cells, "-m", "bench.peers", peer, "--epochs", 1, "--json", f"{peer}.json")
    found = json.loads((cells / f"{peer}.json").read_text())
    assert f"{peer}: test accuracy {found['accuracy']:.4f}" in said
    assert (found["accuracy"] * len(read_rows(cells / "data/prepared", "test").labels)) % 1 < 1e-4


def test_whole(first, tmp_path):
    words = ("--peers", "tutorial", "--epochs", 1, "--project", first.folder)
    said = command(tmp_path, "-m", "bench.whole", *words, "--json", tmp_path / "whole.json")
    assert "linear search / extraction" in said
    assert re.search(r"tutorial +test acc", said)
    (found,) = json.loads((tmp_path / "whole.json").read_text())["rounds"]
    assert {"probe", "stage1", "stage2"} == set(found["ours"]["models"])


def test_startup(repo):
    said = command(repo, "-m", "bench.startup", "--rounds", 1, "--stages", "prepare")
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["prepare", "dvc"]


def test_memory(tmp_path):
    said = command(tmp_path, "-m", "bench.memory", "--images", 60, "--times", 2)
    assert len(re.findall(r"^\w+ +\d+ MB, +\d+ MB: \d\.\d\d$", said, re.MULTILINE)) == 7


def test_large(tmp_path):
    words = ("--images", 60, "--times", 2, "--classes", 3, "--grouped", "--folder", tmp_path)
    said = command(tmp_path, "-m", "bench.large", *words)
    assert said.count("killed and gone on: the same bytes") == 2
    assert "split.draw of 120 images, 3 classes, 30 groups" in said
    assert re.search(r"near duplicates: [1-9]", said)


def test_paper(repo):
    said = command(repo, "-m", "bench.paper", "--hashes", 2000, "--images", "1e6", "1e9")
    assert "1,000,000 images" in said
    assert said.count("prepare: ") == 4


def test_processes(repo):
    said = command(ROOT, "-m", "bench.processes", "--rounds", 1, "--project", repo)
    assert re.findall(r"^(\w+) +(\w+ \w+)", said, re.MULTILINE) == [
        (stage, way)
        for stage in ("extract", "stage2")
        for way in ("one process", "one process", "two processes")
    ]


def test_same(repo):
    said = command(ROOT, "-m", "bench.same", "--project", repo)
    assert said.count("of their movement apart") == 2


def test_seeds_and_known(repo):
    shutil.copytree(ROOT / "runs", repo / "runs", ignore=lambda *_: {"__pycache__"})
    commit(repo, "runs")
    change = ("--set", "stage2.lr=1.0e-4", "--set", "stage2.epochs=1")
    said = command(repo, "runs/seeds.py", "mine", "--seeds", 0, *change)
    assert "mine, 1 seeds: test accuracy" in said
    assert "mine stage2.lr=1.0e-4 stage2.epochs=1,0," in (repo / "runs/results.csv").read_text()
    assert "| mine stage2.lr=1.0e-4 stage2.epochs=1 | 1 |" in command(repo, "-m", "runs.known")


def test_sets(tmp_path):
    digits = np.random.default_rng(0).integers(0, 256, (30, 28, 28)).astype(np.uint8)
    package = tmp_path / "package"
    package.mkdir()
    for prefix in ("train", "t10k"):
        labels = np.arange(30, dtype=np.uint8) % 10
        for name, kind, array in (("images-idx3", 3, digits), ("labels-idx1", 1, labels)):
            sizes = b"".join(size.to_bytes(4) for size in array.shape)
            content = gzip.compress(bytes((0, 0, 8, kind)) + sizes + array.tobytes())
            (package / f"{prefix}-{name}-ubyte.gz").write_bytes(content)
    entry = {"category": "Food", "unified": "1", "image": "1.png", "has_img_apple": True}
    (package / "emoji.json").write_text(json.dumps([entry]))
    (package / "img/apple/64").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(package / "img/apple/64/1.png")
    written = {"digits": 1797, "wafers": 2624, "mnist": 60, "fashion": 60, "emoji": 1}
    for name, images in written.items():
        of = () if name in ("digits", "wafers") else ("--package", package)
        command(tmp_path, "-m", "runs.sets", name, tmp_path / name, *of)
        assert len(list((tmp_path / name).rglob("*.png"))) == images


@pytest.mark.parametrize(("what", "rows"), [("intervals", 7 * (2 + 9)), ("sure", 2 + 9)])
def test_simulate(what, rows):
    said = command(ROOT, "-m", "runs.simulate", what, "--draws", 4)
    assert len(re.findall(r"^\|", said, re.MULTILINE)) == rows


def test_formats(tmp_path):
    name = "timm/mobilenetv4_conv_small"
    said = command(
        tmp_path, "-m", "bench.formats", "--rounds", 1, "--batches", 1, "--networks", name
    )
    for what in ("eager fp32 / forward", "forward / extract's loop"):
        [ratio] = re.findall(rf"([\d.]+)  \(.*\)  {what}, {name} at \d+ px", said)
        assert float(ratio) > 0


def test_the_table_of_recommended_networks_is_the_scripts(tmp_path):
    said = command(tmp_path, "-m", "bench.networks", "--rounds", 1, "--first", 1)
    assert f"| `{RECOMMENDED[0].name}` | 4.7 M | 224 px | " in said
    lines = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8").splitlines()
    assert len(RECOMMENDED) == 20
    for one in RECOMMENDED:
        [line] = [line for line in lines if line.startswith(f"| `{one.name}` |")]
        rate = line.split("|")[4].strip()
        assert int(rate) > 0
        assert line == row(one, rate)


def test_backbones_are_compared_over_seeds_and_a_killed_comparison_goes_on(tmp_path):
    params = read_params(backbone={"weights": "none", "sha256": ""}, extract={"image_size": "auto"})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    photos = write_photos(tmp_path / "photos", each=24)
    words = ("-m", "runs.backbones", f"mine={photos}", "--seeds", 5, 6, "--backbones", TINY)
    first = command(tmp_path, *words, "timm/test_vit")
    lines = [line for line in first.splitlines() if line.startswith("mine ")]
    assert [line.split()[1] for line in lines] == [TINY, "timm/test_vit"]
    assert " +0.0 ± 0.0 points" in lines[0]
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*.json")}
    again = command(tmp_path, *words, "timm/test_vit")
    assert [line for line in again.splitlines() if line.startswith("mine ")] == lines
    assert kept == {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*.json")}


def test_full_runs_are_kept_tabled_and_compared(tmp_path):
    params = read_params(backbone={"weights": "none", "sha256": ""}, extract={"image_size": "auto"})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    photos = write_photos(tmp_path / "photos", each=24)
    words = ("-m", "runs.full", f"mine={photos}", "--seeds", 5, 6)
    first = command(tmp_path, *words).splitlines()
    accuracy, mine = {}, tmp_path / "data/trials/mine"
    for seed in (5, 6):
        folder = mine / f"full-{seed}-plain"
        metrics = json.loads((folder / "report-metrics.json").read_text())["test"]
        scores = np.load(folder / "scores.npz")
        for model in ("probe", "stage1", "stage2"):
            right = scores[f"{model}-test"].argmax(1) == scores["labels-test"]
            assert right.mean() == metrics[model]["accuracy"]
            accuracy[model, seed] = metrics[model]["accuracy"]
    [line] = [line.split() for line in first if line.startswith("mine ")]
    means = [
        f"{np.mean([accuracy[m, s] for s in (5, 6)]):.4f}" for m in ("probe", "stage1", "stage2")
    ]
    assert line[1:5] == ["2", *means]
    gap = np.mean([accuracy["stage2", s] - accuracy["probe", s] for s in (5, 6)])
    assert float(line[6]) == pytest.approx(100 * gap, abs=0.01)
    made = {file: file.stat().st_mtime_ns for file in mine.rglob("*.npz")}
    other = command(
        tmp_path, *words[:3], "--seeds", 5, "--as", "order", "--order", 50, "--against", "plain"
    )
    assert made.items() <= {file: file.stat().st_mtime_ns for file in mine.rglob("*.npz")}.items()
    said = [line for line in other.splitlines() if "mean absolute change" in line]
    assert (
        said[0]
        == "probe: mean absolute change of test accuracy 0.00 points (largest 0.00, 1 pairs)"
    )
    theirs = np.load(mine / "full-5-order" / "scores.npz")
    ours = np.load(mine / "full-5-plain" / "scores.npz")
    assert np.array_equal(theirs["probe-test"], ours["probe-test"])
    assert not np.array_equal(theirs["stage1-test"], ours["stage1-test"])


def test_changed_params_are_screened_and_a_killed_screening_goes_on(tmp_path):
    params = read_params(backbone={"weights": "none", "sha256": ""}, extract={"image_size": "auto"})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    photos = write_photos(tmp_path / "photos", each=24)
    words = ("-m", "runs.screen", f"mine={photos}", "--seeds", 5, 6)
    variants = ("--variant", "stage2.lr=1e-9 stage2.epochs=1")
    first = command(tmp_path, *words, *variants)
    with (tmp_path / "data/trials/screened.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(one["seed"], one["variant"]) for one in rows] == [
        *((seed, variant) for seed in "56" for variant in ("", variants[1]))
    ]
    for one in rows:  # no step that moves the weights
        if one["variant"]:
            assert one["stage2_last_loss"] == one["stage2_start_loss"]
    said = {line.split()[0]: line.split()[1:] for line in first.splitlines()}
    assert said["runs"] == ["2", "2"]
    mean = sum(float(one["stage1_last_loss"]) for one in rows if not one["variant"]) / 2
    assert float(said["stage1_last_loss"][0]) == pytest.approx(mean, abs=1e-4)
    assert float(said["stage1_last_loss"][1]) == 0  # stage 1 is the same
    file = tmp_path / "data/trials/screened.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert command(tmp_path, *words, *variants).splitlines()[-1].split()[0] == "seconds"
    with file.open(newline="") as lines:
        again = list(csv.DictReader(lines))
    assert again[:3] == rows[:3]
    apart = {key for key in rows[3] if rows[3][key] != again[3][key]}
    assert apart <= {"seconds"}  # the same bytes
    wrong = ended(tmp_path, *words, "--variant", "stage2.rate=1")
    assert wrong.stderr == "--variant stage2.rate=1: no such param\n"
