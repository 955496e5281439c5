"""Outputs are the same bytes in any process, from any disk, under any of the machine's settings."""

import os
import random
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, read_params, write_photos
from PIL import Image, ImageEnhance
from repository import python_path
from safetensors.torch import save_file

from pipeline.nets.backbone import pretrained

RUN = """
import os
import time
from pathlib import Path

import yaml

from pipeline.dataset import pack as packing

if os.environ["ORDER"] == "backwards":  # as a disk may list its files
    scandir, listdir = os.scandir, os.listdir

    class Backwards:
        def __init__(self, path="."):
            with scandir(path) as entries:
                self.entries = iter(sorted(entries, key=lambda e: e.name, reverse=True))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def __next__(self):
            return next(self.entries)

        def __iter__(self):
            return self.entries

        def close(self):
            pass

    os.scandir = Backwards
    os.listdir = lambda path=".": sorted(listdir(path), reverse=True)
    decoded = packing.decoded

    def slowly(file, *how):  # the first file's thread ends after others
        time.sleep(file.name == "000.png")
        return decoded(file, *how)

    packing.decoded = slowly

from conftest import STAGES, run

from pipeline.final_model import classifier, onnx as portable
from pipeline.final_model.graph import Graph

params, out = yaml.safe_load(Path("params.yaml").read_text()), Path("out")
run(out, params, "prepare")
os.environ["PIPELINE_THREADS"] = "1"  # another number rounds otherwise from here on
run(out, params, *[name for name in STAGES if name != "prepare"])
final = classifier.load(out / "models/final/model.safetensors")
portable.write(final, Graph(final), out / "model.onnx")
"""

SETTINGS = [
    ({"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C", "PIPELINE_THREADS": "1"}, 0o022),
    (
        {
            "PYTHONHASHSEED": "1",
            "TZ": "Asia/Kolkata",
            "LC_ALL": "C.UTF-8",
            "LANG": "C.UTF-8",
            "PIPELINE_THREADS": "2",
            "ORDER": "backwards",
        },
        0o077,
    ),
]


def odd_photos(folder: Path) -> Path:
    """Write photos with what prepare has to tell of: damage, copies, near duplicates, others."""
    write_photos(folder)
    for name in ("class0/000", "class0/001", "class0/002", "class1/005", "class1/006"):
        file = folder / f"{name}.png"
        file.write_bytes(file.read_bytes()[:1000])  # its header is whole
    for name in ("class0/empty.png", "class1/text.png", "class1/notes.txt"):
        (folder / name).write_text("spring" * ("empty" not in name))
    shutil.copy(folder / "class0" / "003.png", folder / "class0" / "größer.png")
    with Image.open(folder / "class1" / "007.png") as image:
        ImageEnhance.Brightness(image).enhance(1.05).save(folder / "class1" / "brighter.png")
    return folder


def written(folder: Path, photos: Path, settings: dict[str, str], umask: int) -> dict[str, str]:
    """Run the graph on a copy of the photos in a process; gives the hash of each file written."""
    files = sorted(file.relative_to(photos) for file in photos.rglob("*.*"))
    random.Random(settings["PYTHONHASHSEED"]).shuffle(files)  # the order they come to the disk in
    for file in files:
        (folder / "photos" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / file, folder / "photos" / file)
    for name in ("first", "second"):  # two links to one folder, of which one is taken
        (folder / "photos" / "class1" / name).symlink_to(folder / "linked")
    write_photos(folder / "linked", classes=1, each=2, first=50)
    model, _ = pretrained(TINY, "none", "", seed=0)
    save_file(model.state_dict(), folder / "tiny.safetensors")
    digest = sha256((folder / "tiny.safetensors").read_bytes()).hexdigest()
    params = read_params(
        prepare={"path": "photos", "not_images": "skip"},
        backbone={"name": TINY, "weights": "tiny.safetensors", "sha256": digest},
    )
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "run.py").write_text(RUN)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    where = {
        "PYTHONPATH": python_path(ROOT, ROOT / "tests"),
        "PIPELINE_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "run.py"],
        cwd=folder,
        env={**env, "OMP_NUM_THREADS": "1", "ORDER": "forwards", **where, **settings},
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = folder / "out"
    found = sorted(file for file in out.rglob("*") if file.is_file())
    return {str(f.relative_to(out)): sha256(f.read_bytes()).hexdigest() for f in found}


@pytest.mark.long
def test_two_processes_under_other_settings_write_the_same_bytes(tmp_path):
    photos = odd_photos(tmp_path / "drawn")
    one, two = (
        written(tmp_path / settings["PYTHONHASHSEED"], photos, settings, umask)
        for settings, umask in SETTINGS
    )
    kinds = {Path(name).suffix for name in one}
    assert {".json", ".csv", ".npy", ".safetensors", ".html", ".txt", ".onnx"} <= kinds
    assert [name for name in one if one[name] != two.get(name)] == []
    assert list(one) == list(two)
