"""Kill `dvc repro` at random moments and look whether anything is lost or different.

    python tests/torture.py                     # a hundred kills on 400 real images
    python tests/torture.py --kills 10 --seed 1

Each kill is of DVC or of the stage, by SIGKILL or SIGTERM, at a random moment of the run, or just
when a stage has ended and DVC hasn't recorded it. After it no process may be left. Then the same
command goes on, and ends with the hashes of a run that nobody disturbed.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from repository import ROOT, environment, hashes, new_repository

IMAGES = 400
SIDE = 96
MARK = "TORTURE"
TIMINGS = "models/*/timing.json"  # a stage writes it last
SETTLE = 15.0  # seconds until what was killed has to be gone
# What DVC says if it was killed as it wrote the file.
TORN = re.compile(r"dvc\.lock' (validation failed|is invalid)")
STARTED = re.compile(r"^Running stage '(\w+)'", re.MULTILINE)


@dataclass
class Run:
    """A `dvc repro`, from outside."""

    folder: Path
    process: "subprocess.Popen[str]"
    log: Path
    started: float

    def said(self) -> str:
        """Give what it has printed."""
        return self.log.read_text(errors="replace")

    def stages(self) -> list[int]:
        """List the processes of the stage that runs now."""
        return [pid for pid in processes(self.folder) if b"-m pipeline " in command_of(pid)]


def main() -> None:
    """Run once undisturbed, then be killed, and print the tally."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--in-a-row", type=int, default=1, help="kills before a run may end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "repo"
        real_images(folder / "photos")
        new_repository(folder, real_params())
        sys.exit(torture(folder, options.kills, options.in_a_row, options.seed))


def torture(folder: Path, kills: int, in_a_row: int, seed: int) -> int:
    """Kill runs of a repository's graph so often; gives 1 if anything was wrong, and says what."""
    chance = random.Random(seed)
    run = start(folder)
    undisturbed, expected = ended(run), hashes(folder)
    print(f"undisturbed: {undisturbed:.0f} s, {len(expected)} outputs", flush=True)
    tally: Counter[str] = Counter()
    lost, done, wrong = [], 0, []
    while done < kills:
        reset(folder)
        spent = 0.0
        row = min(in_a_row, kills - done)
        for _ in range(row):
            run = start(folder)
            what = disturb(run, chance, undisturbed)
            spent += time.monotonic() - run.started
            tally[what] += 1
            done += 1
            if left := gone(folder):
                wrong.append(f"kill {done}, {what}: left {[command_of(p) for p in left]}")
            print(f"{done:>4}  {what}", flush=True)
        run = start(folder)
        spent += ended(run)
        if run.process.returncode and TORN.search(run.said()):
            # As docs/resuming.md says.
            tally["dvc.lock was incomplete, and was deleted"] += 1
            (folder / "dvc.lock").unlink()
            run = start(folder)
            spent += ended(run)
        if run.process.returncode:
            wrong.append(f"kill {done}: the next repro ended with {run.process.returncode}")
            print(run.said())
        elif hashes(folder) != expected:
            now = hashes(folder)
            differ = [out for out in expected if now.get(out) != expected[out]]
            wrong.append(f"kill {done}: other hashes of {differ}")
        parts = [str(p) for p in folder.rglob("*.part") if ".dvc" not in p.parts]
        wrong += [f"kill {done}: left {part}" for part in parts]
        lost.append((spent - undisturbed) / row)
    for what, times in sorted(tally.items()):
        print(f"{times:>4}  {what}")
    lost.sort()
    print(
        f"{done} kills, {len(lost)} runs completed after them, {len(wrong)} things wrong; "
        f"a kill cost {lost[len(lost) // 2]:.1f} s (median; at most {lost[-1]:.1f} s), start of "
        "DVC and of the stage's libraries included"
    )
    print("\n".join(wrong))
    return int(bool(wrong))


def real_images(folder: Path) -> None:
    """Copy solar cells of the packaged set into class folders, with whole modules together."""
    sys.path.insert(0, str(ROOT))
    from pipeline.dataset.sources import elpv

    found = elpv()
    for item in found.items[:: len(found.items) // IMAGES][:IMAGES]:
        target = folder / item.label / item.group / Path(item.path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(found.folder / item.path, target)


def real_params() -> dict[str, Any]:
    """Give the project's params with smaller images and fewer epochs, for a run of a minute."""
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["prepare"].update(source="folder", path="photos", size=SIDE)
    params["extract"].update(image_size=SIDE, views=2)
    params["stage1"].update(image_size=SIDE, epochs=4, views=2)
    params["stage2"].update(image_size=SIDE, epochs=3)
    params["evaluate"].update(views=2)
    return params


def start(folder: Path) -> Run:
    """Start `dvc repro`."""
    log = folder.parent / "log"
    env = {**environment(folder), MARK: str(folder), "PIPELINE_SAVE_SECONDS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro"], cwd=folder, env=env, stdout=out, stderr=out
        )
    return Run(folder, process, log, time.monotonic())


def ended(run: Run) -> float:
    """Wait for the end; gives the seconds it took."""
    run.process.wait()
    return time.monotonic() - run.started


def disturb(run: Run, chance: random.Random, seconds: float) -> str:
    """Kill a run or its stage; says what was killed, how and where."""
    number = chance.choice([signal.SIGKILL, signal.SIGTERM])
    if chance.random() < 0.25:
        where = between(run, chance)
    else:
        time.sleep(chance.uniform(0, seconds))
        where = "during"
    whom = chance.choice(["dvc", "stage"])
    stage = (STARTED.findall(run.said()) or ["start"])[-1]
    victims = run.stages() if whom == "stage" else []
    victim = chance.choice(victims) if victims else run.process.pid
    try:
        os.kill(victim, number)
    except ProcessLookupError:
        where = "after"
    # DVC, too, has to end: when its stage fails it does.
    give_up = time.monotonic() + SETTLE
    while run.process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.05)
    if run.process.poll() is None:
        run.process.kill()
        run.process.wait()
    return f"{number.name} of {whom if victims or whom == 'dvc' else 'dvc'}, {where} {stage}"


def between(run: Run, chance: random.Random) -> str:
    """Wait until some stage has written its last file, which DVC is then about to record."""
    ended = {file: file.stat().st_mtime_ns for file in run.folder.glob(TIMINGS)}
    before = dict(ended)
    wanted = chance.randint(1, 8)  # which of the stages that run yet
    while run.process.poll() is None and wanted:
        for file in run.folder.glob(TIMINGS):
            try:
                written = file.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            if before.get(file) == ended.get(file) != written:  # DVC's own copy doesn't count
                ended[file] = written
                wanted -= 1
        time.sleep(0.001)
    return "between the end and the record of"


def gone(folder: Path) -> list[int]:
    """Wait until no process of a run is left; lists those that stay."""
    give_up = time.monotonic() + SETTLE
    while (left := processes(folder)) and time.monotonic() < give_up:
        time.sleep(0.05)
    return left


def processes(folder: Path) -> list[int]:
    """List the processes of runs in a folder, by what is in their environment."""
    mark = f"{MARK}={folder}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def command_of(pid: int) -> bytes:
    """Give a process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return b""


def reset(folder: Path) -> None:
    """Forget all that runs left in a repository."""
    shutil.rmtree(folder / ".dvc" / "cache", ignore_errors=True)
    shutil.rmtree(folder / ".pipeline", ignore_errors=True)
    for path in ("data", "models", "dvc.lock"):
        target = folder / path
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    (folder / "data" / "raw").mkdir(parents=True)


if __name__ == "__main__":
    main()
