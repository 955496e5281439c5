"""Runs that share a cache don't disturb each other."""

import os
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT
from filelock import FileLock, SoftFileLock
from repository import python_path

from pipeline.stage_runtime.cache_entries import DELETED, discard, hold, make_room

# Holds entries at random, checks that nobody else writes there, and deletes others.
HAMMER = """
import os, random, sys, time
from pathlib import Path
from pipeline.stage_runtime.cache_entries import discard, hold, make_room

root, chance, end = Path(sys.argv[1]), random.Random(int(sys.argv[2])), time.time() + 4
held = 0
while time.time() < end:
    own = root / f"entry{chance.randrange(5)}"
    with hold(own, "hammer"):
        mine = own / "mine"
        mine.write_bytes(os.getpid().to_bytes(8) * 20_000)
        deed = chance.choice([lambda: make_room(own, chance.choice([0, 1e6])),
                              lambda: make_room(own, count_held=False),
                              lambda: discard(own, lambda folder: chance.random() < 0.5)])
        deed()
        time.sleep(chance.random() / 50)
        assert mine.read_bytes() == os.getpid().to_bytes(8) * 20_000
        held += 1
print(held)
"""


def started(code: str, *words: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, "PYTHONPATH": python_path(ROOT), "PIPELINE_CACHE_GB": "0.0005"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def entry(root: Path, name: str, used: float) -> Path:
    with hold(root / name, name):
        (root / name / "file").write_bytes(bytes(8192))
    os.utime(root / name, (used, used))
    return root / name


# Where locks are only files, they go with who holds them.
OWN_LOCKS = set() if FileLock is SoftFileLock else {".lock", "own.lock"}


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_nothing_that_is_held_is_lost_whoever_else_holds_and_deletes(tmp_path):
    running = [started(HAMMER, tmp_path / "root", seed) for seed in range(4)]
    ended = [process.communicate() for process in running]
    assert [said for _, said in ended] == [""] * 4
    assert all(int(out.splitlines()[-1]) > 5 for out, _ in ended)
    left = names(tmp_path / "root") - {".lock"}
    assert left <= {f"entry{i}{end}" for i in range(5) for end in ("", ".lock")}


def test_an_entry_goes_with_its_lock(tmp_path):
    entry(tmp_path, "old", 1)
    own = entry(tmp_path, "own", 2)
    discard(own, lambda folder: True)
    assert names(tmp_path) == {"own"} | OWN_LOCKS


def test_what_was_used_longest_ago_makes_room(tmp_path, monkeypatch):
    monkeypatch.setenv("PIPELINE_CACHE_GB", str(20_000 / 1e9))
    own = entry(tmp_path, "own", 0)
    for i, name in enumerate("cab"):
        entry(tmp_path, name, i + 1)
    make_room(own, 4_000)
    assert {"own", "b"} == {name for name in names(tmp_path) if "." not in name}


def test_what_is_held_counts_as_taken_only_where_that_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv("PIPELINE_CACHE_GB", str(10_000 / 1e9))
    own, free = entry(tmp_path, "own", 0), entry(tmp_path, "free", 1)
    with hold(tmp_path / "held", "another run"):
        (tmp_path / "held" / "file").write_bytes(bytes(8192))
        make_room(own, count_held=False)
        assert free.exists()
        make_room(own)
        assert not free.exists()
        assert (tmp_path / "held" / "file").exists()


def test_a_deletion_that_was_cut_off_is_finished_by_the_next(tmp_path):
    own = entry(tmp_path, "own", 0)
    (tmp_path / f"{DELETED}other").mkdir()
    (tmp_path / f"{DELETED}other" / "file").touch()
    make_room(own)
    assert names(tmp_path) == {"own"} | OWN_LOCKS


def test_the_lock_of_a_killed_run_holds_nobody_up(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from pipeline.stage_runtime.cache_entries import hold\n"
        "with hold(Path(sys.argv[1]), 'x'):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    process = started(code, tmp_path / "entry")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    begin = time.monotonic()
    process.kill()
    process.wait()  # or it stays a zombie, which looks alive where locks are files
    with hold(tmp_path / "entry", "x"):
        assert time.monotonic() - begin < 5
