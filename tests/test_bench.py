"""Every command of bench/ and runs/ runs, on little: what it measures then says nothing."""

import csv
import gzip
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, call, read_params, write_photos
from PIL import Image
from repository import commit, environment, python_path

from bench.networks import RECOMMENDED, row
from pipeline.final_model.candidates import SINGLE
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


def accuracy(scores, model, on):
    return (scores[f"{model}-{on}"].argmax(1) == scores[f"labels-{on}"]).mean()


def test_variants_are_run_over_seeds_tabled_and_a_killed_table_goes_on(tmp_path):
    params = read_params(backbone={"weights": "none", "sha256": ""}, extract={"image_size": "auto"})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    photos = write_photos(tmp_path / "photos", each=24)
    words = ("-m", "runs.variants", f"mine={photos}", "--seeds", 5, 6)
    still = ("--variant", "still", "stage2.lr=1e-9 stage2.epochs=1")
    first = command(tmp_path, *words, *still, "--on", "test").splitlines()
    mine = tmp_path / "data/trials/mine"
    found = {
        (seed, name): np.load(mine / f"run-{seed}-0-{name}" / "scores.npz")
        for seed in (5, 6)
        for name in ("plain", "still")
    }
    line, _ = [line.split() for line in first if line.split()[:1] == ["mine"]]
    plain = {m: [accuracy(found[s, "plain"], m, "test") for s in (5, 6)] for m in SINGLE}
    assert line[1:5] == ["2", *(f"{np.mean(plain[m]):.4f}" for m in SINGLE)]
    gap = np.mean(np.subtract(plain["stage2"], plain["probe"]))
    assert float(line[7]) == pytest.approx(100 * gap, abs=0.01)
    for seed in (5, 6):  # stage 1 is shared; no step moved stage 2's weights
        one, two = found[seed, "plain"], found[seed, "still"]
        assert np.array_equal(one["stage1-val"], two["stage1-val"])
        with (mine / f"run-{seed}-0-still/stage2-history.csv").open(newline="") as lines:
            losses = [float(row["val_loss"]) for row in csv.DictReader(lines)]
        assert losses[-1] == pytest.approx(losses[-2], abs=1e-6)
    [apart] = [line.split() for line in first if line.startswith("still ")]
    assert apart[1:3] == ["1", "2"]
    moved = np.mean([accuracy(found[s, "still"], "stage2", "test") for s in (5, 6)])
    assert f"{100 * (moved - np.mean(plain['stage2'])):+.2f}" in apart
    made = {file: file.stat().st_mtime_ns for file in mine.rglob("*.npz")}
    shutil.rmtree(mine / "run-6-0-still")
    again = command(tmp_path, *words, *still, "--on", "test").splitlines()
    assert again[-len(first[-8:]) :] == first[-8:]  # the same bytes
    now = {file: file.stat().st_mtime_ns for file in mine.rglob("*.npz")}
    assert {file for file in made if made[file] != now[file]} == {
        mine / "run-6-0-still" / "scores.npz"
    }
    wrong = ended(tmp_path, *words, "--variant", "wrong", "stage2.rate=1")
    assert wrong.stderr == "--variant stage2.rate=1: no such param\n"
    wrong = ended(tmp_path, *words, "--variant", "still", "stage2.lr=1e-8 stage2.epochs=1")
    assert "run-5-0-still: was made with other params; delete it, or set --keep" in wrong.stderr
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**params, "class_weight": "balanced"}))
    assert "run-5-0-plain: was made with other params" in ended(tmp_path, *words).stderr


def test_orders_are_compared_in_lanes_on_a_part_of_a_set(tmp_path):
    params = read_params(backbone={"weights": "none", "sha256": ""}, extract={"image_size": "auto"})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    photos = write_photos(tmp_path / "photos", each=40)
    words = ("-m", "runs.variants", f"mine:24={photos}", "--seeds", 5, "--on", "test")
    told = command(tmp_path, *words, "--orders", 0, 50, "--lanes", 2).splitlines()
    part = tmp_path / "data/trials/mine-24"
    one, other = (np.load(part / f"run-5-{order}-plain" / "scores.npz") for order in (0, 50))
    assert np.array_equal(one["probe-test"], other["probe-test"])
    assert not np.array_equal(one["stage1-test"], other["stage1-test"])
    for model in SINGLE:
        gap = 100 * abs(accuracy(one, model, "test") - accuracy(other, model, "test"))
        others = 100 * (one[f"{model}-test"].argmax(1) != other[f"{model}-test"].argmax(1)).mean()
        assert (
            f"plain: {model}: mean absolute change {gap:.2f} points (largest {gap:.2f}, 1 pairs), "
            f"{others:.1f} % other answers" in told
        )
    with (part / "prepared-5-64px/index.csv").open(newline="") as lines:
        drawn = {row["path"]: row["split"] for row in csv.DictReader(lines)}
    whole = tmp_path / "data/trials/mine/prepared-5-64px/index.csv"
    with whole.open(newline="") as lines:
        of_whole = {row["path"]: row["split"] for row in csv.DictReader(lines)}
    assert Counter(drawn.values()) == {"train": 24, "val": 6, "test": 30}
    assert {of_whole[path] for path in drawn} == {"train", "val"}
    late = command(tmp_path, *words, "--seeds", 6, "--seconds", 0).splitlines()
    assert "1 of 1 runs were not started: run this again" in late
