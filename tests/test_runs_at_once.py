"""Experiments that run at once with one cache, each killed once, end as each does alone."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run
from repository import change, commit, dvc, environment, git, hashes

RATES = {"one": 1e-5, "two": 2e-5, "three": 4e-5}
EPOCHS = 60


def experiment(repo: Path, name: str, cache: Path) -> "subprocess.Popen[str]":
    """Start an experiment up to stage 2 in a temporary folder of its own."""
    rate = f"stage2.lr={RATES[name]:g}"
    words = [
        sys.executable,
        "-m",
        "dvc",
        "exp",
        "run",
        "--temp",
        "--name",
        name,
        "-S",
        rate,
        "stage2",
    ]
    return subprocess.Popen(
        words,
        cwd=repo,
        env={**environment(repo), "PIPELINE_CACHE": str(cache), "PIPELINE_SAVE_SECONDS": "0.2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers(repo: Path) -> dict[Path, int]:
    """Find the processes that work at stage 2 in temporary folders: the children of others."""
    found, parents = {}, {}
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            folder = (process / "cwd").resolve()
            named = {b"pipeline", b"stage2"} <= set(words)
            if named and folder.is_relative_to(repo / ".dvc/tmp/exps"):
                stat = (process / "stat").read_text()
                parents[int(process.name)] = int(stat.rpartition(")")[2].split()[1])
                found[int(process.name)] = folder
        except (OSError, ValueError):
            continue
    return {folder: pid for pid, folder in found.items() if parents[pid] in parents}


def wait_until(is_so: Callable[[], bool], seconds: float = 300) -> None:
    give_up = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def epochs_done(folder: Path) -> int:
    """Count the epochs that stage 2 has written down in a folder."""
    try:
        return len((folder / "models/stage2/history.csv").read_text().splitlines()) - 2
    except FileNotFoundError:
        return 0


def recorded(repo: Path, name: str, folder: Path) -> dict[str, str]:
    """Read the hashes that an experiment has recorded."""
    refs = git(repo, "for-each-ref", "--format=%(refname)", "refs/exps").splitlines()
    [ref] = [ref for ref in refs if ref.endswith(f"/{name}")]
    folder.mkdir()
    (folder / "dvc.lock").write_text(git(repo, "show", f"{ref}:dvc.lock"))
    return hashes(folder)


@pytest.mark.long
def test_three_experiments_that_are_killed_go_on_in_other_folders_and_end_as_alone(
    first: Run, tmp_path: Path
) -> None:
    """In a clone each, as DVC starts one `--temp` after the other in one repository."""
    repo = shutil.copytree(first.folder, tmp_path / "repo")
    change(repo, "stage2.epochs", EPOCHS)
    commit(repo, "longer")
    clones, expected = {}, {}
    for name, rate in RATES.items():
        clones[name] = shutil.copytree(repo, tmp_path / name / "repo").resolve()
        alone = shutil.copytree(repo, tmp_path / "alone" / name)
        change(alone, "stage2.lr", rate)
        dvc(alone, "repro", "stage2")
        expected[name] = hashes(alone)

    cache = tmp_path / "cache"
    running = {name: experiment(clone, name, cache) for name, clone in clones.items()}
    killed: set[Path] = set()

    def all_are_killed() -> bool:
        for clone in clones.values():
            for folder, pid in workers(clone).items():
                if folder not in killed and epochs_done(folder) >= 2:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(folder)
        return len(killed) == len(RATES)

    wait_until(all_are_killed)
    for process in running.values():
        said, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "error: stage2 was killed by SIGKILL" in said
    assert len(list(cache.glob("resume/stage2-*/training.safetensors"))) == len(RATES)

    again = {name: experiment(clone, name, cache) for name, clone in clones.items()}
    folders: set[Path] = set()

    def all_are_seen() -> bool:
        folders.update(folder for clone in clones.values() for folder in workers(clone))
        return len(folders) == len(RATES)

    wait_until(all_are_seen)
    assert not folders & killed
    for name, process in again.items():
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        [epoch] = re.findall(r"resuming at epoch (\d+)", said)
        print(f"{name} went on at epoch {epoch} of {EPOCHS}")
        assert 1 < int(epoch) < EPOCHS
        assert recorded(clones[name], name, tmp_path / name / "lock") == expected[name]
