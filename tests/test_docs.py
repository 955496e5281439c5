"""What README and docs tell people to type works, and what they point to is there."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PHOTOS, ROOT, STAGES, Run, write_photos
from hub_server import Hub
from PIL import Image
from repository import change, commit, environment, git
from safetensors.torch import save

import pipeline.__main__
from pipeline.commands.dependencies import table
from pipeline.commands.params import FILE, described
from pipeline.nets.backbone import pretrained

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TYPED = [page for page in PAGES if "```console" in page.read_text()]
BY_NAME = ("README", "backbones", "recipes")  # pages that name networks with weights of a hub
NOT_HERE = ("test", "test-long", "verify", "torture", "bench")  # targets that take long

# A `make` that takes this environment for the installed one, and only names what takes long.
MAKE = """#!/bin/sh
[ -e .venv ] || ln -s {prefix} .venv
case "$1" in {long}) exec {make} -o .venv/.installed -o .venv/.dev -n "$@" ;; esac
exec {make} -o .venv/.installed "$@"
"""


def blocks(page: Path) -> list[list[str]]:
    """List a page's console blocks, each as its commands."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        joined = block.replace("\\\n", " ")
        found.append([line[2:] for line in joined.splitlines() if line.startswith("$ ")])
    return found


def new_home(first: Run, around: Path) -> Path:
    """Make a finished repository whose `origin` has it, with all that pages take for granted."""
    folder = shutil.copytree(first.folder, around / "project")
    if around.name in BY_NAME:  # as they are by default, not of the tests' own network
        change(folder, "backbone.weights", "imagenet")
        change(folder, "backbone.sha256", "")
        for key in ("extract.image_size", "stage1.image_size", "stage2.image_size"):
            change(folder, key, "auto")
        change(folder, "stage1.unfreeze", "auto")
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "runs", folder / "runs", ignore=lambda *_: {"__pycache__"})
    commit(folder, "make")
    git(around, "clone", "--quiet", "--bare", str(folder), str(around / "origin"))
    git(folder, "remote", "add", "origin", str(around / "origin"))
    for name in ("pictures", "new", "project/data/mine"):
        write_photos(around / name, first=50)
    write_photos(folder / "new", each=3, first=99)
    table = folder / "data/table"
    rows = ["path,label,group"]
    for i, file in enumerate(sorted(write_photos(table / "drawn").rglob("*.png"))):
        rows.append(f"{file.relative_to(table)},{file.parent.name},g{i // 2}")
    (table / "labels.csv").write_text("\n".join(rows))
    pets = folder / "data/pets"
    pets.mkdir(parents=True)
    for i, file in enumerate(sorted(write_photos(around / "animals").rglob("*.png"))):
        Image.open(file).save(pets / f"{'cat' if i < 16 else 'dog'}.{i}.jpg")
    skin = folder / "data/ham"
    rows = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    for i, file in enumerate(sorted(write_photos(around / "skin").rglob("*.png"))):
        part = skin / f"HAM10000_images_part_{1 + i % 2}"
        part.mkdir(parents=True, exist_ok=True)
        name = f"ISIC_{24306 + i:07d}"
        shutil.copy(file, part / f"{name}.png")
        rows.append(f"HAM_{i // 2:07d},{name},{('bkl', 'nv')[i // 16]},histo,80.0,male,scalp")
    (skin / "HAM10000_metadata.csv").write_text("\n".join(rows))
    (folder / "old").mkdir()
    shutil.copy(folder / "models/stage2/model.safetensors", folder / "old")
    # Weights as torchvision keeps them once fetched.
    hub = around / "hub/hub/checkpoints"
    hub.mkdir(parents=True)
    model, _ = pretrained("torchvision/resnet18", "none", "", seed=0)
    torch.save(model.state_dict(), hub / "resnet18-f37072fd.pth")
    programs = around / "programs"
    programs.mkdir()
    make = MAKE.format(prefix=sys.prefix, long="|".join(NOT_HERE), make=shutil.which("make"))
    for name, text in {"make": make, "xdg-open": "#!/bin/sh\ntest -s $1\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return folder


class Drawn(dict[tuple[str, str], bytes | int]):
    """The weights of every network of timm, drawn when they are asked for."""

    def get(self, key: tuple[str, str], default: Any = None) -> Any:
        if key not in self and key[1] == "model.safetensors":
            model, _ = pretrained(key[0], "none", "", seed=0)
            self[key] = save(model.state_dict())
        return super().get(key, default)


def typed(page: Path, home: Path, hub: str) -> None:
    """Type what a page says, block by block, with one processor."""
    around = home.parent
    env = {
        **environment(home),
        **{"HOME": str(around), "TORCH_HOME": str(around / "hub")},
        **{"HF_ENDPOINT": hub, "HF_HOME": str(around / "hub" / "huggingface")},
        **{"PIPELINE_THREADS": "1", "OMP_NUM_THREADS": "1"},
    }
    for name in [name for name in env if name.startswith("MAKE") or name == "MFLAGS"]:
        del env[name]  # of the `make` that runs this test
    env["PATH"] = f"{around / 'programs'}{os.pathsep}{env['PATH']}"
    meant = {
        "REPOSITORY": str(around / "origin"),
        "/tmp/store": str(around / "store"),
        "SHA256": sha256((home / "old/model.safetensors").read_bytes()).hexdigest(),
        "FOLDER": PHOTOS,
        "--seeds 0 1 2": "--seeds 0 --set stage1.epochs=1",  # one will do, of each
    }
    for commands in blocks(page):
        script = "\n".join(["set -eo pipefail", *commands])
        for placeholder, value in meant.items():
            script = script.replace(placeholder, value)
        done = subprocess.run(
            ["bash", "-c", script], cwd=home, env=env, capture_output=True, text=True, check=False
        )
        said = [page.name, *commands, done.stdout[-2000:], done.stderr[-3000:]]
        assert done.returncode == 0, "\n".join(said)


@pytest.mark.long
def test_what_the_pages_say_to_type_works(first, tmp_path):
    # Two at a time: most of the time goes into starting programs.
    with Hub(Drawn()) as hub, ThreadPoolExecutor(2) as lanes:
        longest = sorted(TYPED, key=lambda page: -page.read_text().count("dvc exp run"))
        begun = []
        for page in longest:
            (tmp_path / page.stem).mkdir()
            begun.append(
                lanes.submit(typed, page, new_home(first, tmp_path / page.stem), hub.address)
            )
        wrong = [str(error) for one in begun if (error := one.exception())]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def test_from_a_clone_to_a_compared_change_it_takes_no_more_than_ten_commands():
    [tour] = [block for block in blocks(PAGES[0]) if any("git clone" in line for line in block)]
    assert len(tour) <= 10
    for step in (
        "make repro",
        "dvc exp run",
        "pipeline compare",
        "pipeline predict",
    ):
        assert any(step in line for line in tour)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for name in re.findall(r"python -m (pipeline|bench|runs)\.(\w+)", text):
        assert (ROOT / name[0] / f"{name[1]}.py").exists(), name
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:`|\$ |&& )make ([\w-]+)", text):
        assert target in targets, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_params_that_a_page_names_exist(page):
    keys = {one.key for one in described(ROOT / FILE)}
    sections = "|".join({key.split(".")[0] for key in keys if "." in key})
    named = re.findall(rf"(?:`|-S '?|--set )((?:{sections})\.\w+)(?=[`:= ])", page.read_text())
    files = {"probe.safetensors"}
    outputs = {"probe.cv_accuracy"}  # a metric
    assert set(named) - keys - files - outputs == set()


def test_the_page_of_files_is_what_the_command_writes():
    written = "\n".join([*table(), ""])
    assert (ROOT / "docs" / "files.md").read_text(encoding="utf-8") == written


def test_bare_the_package_lists_every_stage_and_command():
    files = [*(ROOT / "pipeline/commands").glob("*.py"), *(ROOT / "pipeline/launcher").glob("*.py")]
    commands = {f.stem for f in files if "\ndef main() -> None:" in f.read_text(encoding="utf-8")}
    listed = re.findall(r"^    (\w+) ", pipeline.__main__.__doc__ or "", re.MULTILINE)
    assert sorted(listed) == sorted({*STAGES, *commands})


def test_each_line_of_what_is_read_is_held_by_a_test():
    lines = (ROOT / "docs" / "what-is-read.md").read_text(encoding="utf-8").splitlines()
    named = [line.rsplit("|", 2)[1].strip(" `") for line in lines if line.startswith("| ")]
    named = [name for name in named if name != "test"]
    assert len(named) > 30
    for name in named:
        file, _, test = name.partition("::")
        assert f"def {test}(" in (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"), name
