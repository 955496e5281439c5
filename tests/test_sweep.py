"""Many runs by one command, merges, and projects below a repository's root: what DVC's users do."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, read_params, write_photos
from repository import (
    change,
    command,
    commit,
    dvc,
    environment,
    git,
    new_repository,
    python_path,
    tool,
)
from ruamel.yaml import YAML

from pipeline.commands.sweep import planned
from pipeline.stage_runtime.errors import ParamError

KNOWN = ["seed", "stage1.unfreeze", "stage2.lr", "backbone.name", "prepare.test_fold"]


def names(*settings: str, to: str = "") -> list[str]:
    return [run.name for run in planned(settings, KNOWN, to)]


def test_every_combination_is_a_run_of_its_own():
    runs = planned(["seed=0,1", "stage2.lr=1e-5,5e-5"], KNOWN)
    assert [run.settings for run in runs] == [
        ("seed=0", "stage2.lr=1e-5"),
        ("seed=0", "stage2.lr=5e-5"),
        ("seed=1", "stage2.lr=1e-5"),
        ("seed=1", "stage2.lr=5e-5"),
    ]
    assert names("seed=0,1", "stage2.lr=1e-5") == ["seed-0-lr-1e-5", "seed-1-lr-1e-5"]
    assert names("seed=3", to="probe") == ["seed-3-to-probe"]


def test_commas_in_brackets_and_quotes_part_nothing():
    runs = planned(["stage1.unfreeze=[],[a,b],['*']", "backbone.name='x,y'"], KNOWN)
    assert [run.settings[0].partition("=")[2] for run in runs] == ["[]", "[a,b]", "['*']"]
    assert len({run.name for run in runs}) == 3


def test_all_folds_are_named_by_a_star():
    runs = planned(["prepare.test_fold=*/3", "seed=0,1"], KNOWN)
    assert [run.settings for run in runs] == [
        (f"prepare.test_fold={number}/3", f"seed={seed}") for number in (1, 2, 3) for seed in (0, 1)
    ]
    assert len({run.name for run in runs}) == 6
    assert [run.settings[0] for run in planned(["prepare.test_fold=*/1"], KNOWN)] == [
        "prepare.test_fold=*/1"  # which prepare refuses
    ]


@pytest.mark.parametrize(
    "value", ["torchvision/resnet18", "a..b", "x.lock", "ä", "[a, b]", "-", "x" * 300]
)
def test_a_name_is_one_that_git_allows(value):
    [name] = names(f"backbone.name={value}")
    words = ["git", "check-ref-format", "--normalize", f"refs/exps/ab/cd/{name}"]
    assert subprocess.run(words, check=False, capture_output=True).returncode == 0
    assert len(name) < 80


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["sed=0"], "no 'sed' in params.yaml; did you mean seed"),
        (["seed"], "expected KEY=VALUE"),
        (["seed="], "expected KEY=VALUE"),
        (["seed=1,1"], "seed-1 twice; give each value once"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_runs(settings, line):
    with pytest.raises(ParamError, match=line):
        planned(settings, KNOWN)


# A graph of one stage, which takes no time


MINI = """
stages:
  one:
    cmd: python one.py
    deps: [one.py]
    params: [a, b]
    metrics:
      - m.json:
          cache: false
"""
ONE = """
import json, time, yaml
params = yaml.safe_load(open("params.yaml"))
time.sleep(params["b"])
if params["a"] < 0: raise SystemExit("error: a is below 0")
json.dump({"x": 2 * params["a"]}, open("m.json", "w"))
"""


def mini(root: Path, below: str = "") -> Path:
    """Make a repository whose project may lie below its root."""
    project = root / below
    project.mkdir(parents=True)
    (project / "dvc.yaml").write_text(MINI)
    (project / "one.py").write_text(ONE)
    (project / "params.yaml").write_text("a: 1\nb: 0.0\n")
    (project / ".gitignore").write_text("/.pipeline/\n")
    git(root, "init", "--quiet")
    dvc(root, "init", "--quiet")
    dvc(project, "repro", "--quiet")
    commit(root, "start")
    return project


def sweep(project: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "sweep", *words],
        cwd=project,
        env={**environment(project), "PYTHONPATH": python_path(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def results(project: Path) -> dict[str, Any]:
    """Give each experiment's metric, as DVC shows it."""
    found = json.loads(dvc(project, "exp", "show", "--json"))
    of_commits = [e for rev in found if rev["rev"] != "workspace" for e in rev["experiments"] or []]
    shown = [run for exps in of_commits for run in exps["revs"]]
    return {run["name"]: next(iter(run["data"]["metrics"].values()))["data"]["x"] for run in shown}


@pytest.mark.parametrize(
    "where",
    [("repo", ""), pytest.param(("größe x", "teil/projekt"), marks=pytest.mark.long)],
)
def test_a_sweep_ends_and_says_what_failed(tmp_path, where):
    project = mini(tmp_path / where[0], where[1])
    done = sweep(project, "-S", "a=3,-4", "--jobs", "2")
    assert done.returncode == 1
    assert "failed: error: a is below 0" in done.stdout
    assert done.stderr == "error: 1 of 2 runs failed: a--4\n"
    assert results(project) == {"a-3": 6}
    again = sweep(project, "-S", "a=3")
    assert again.stdout.startswith("1 runs, 1 already finished")
    assert git(project, "status", "--short", ".") == ""
    (project / "params.yaml").write_text("a: 2\nb: 0.0\n")
    line = "params.yaml is not committed, and runs start from the last commit; commit it first\n"
    assert sweep(project, "-S", "a=5").stderr == f"error: {Path(where[1], line)}"


@pytest.mark.long
def test_a_hundred_runs_killed_three_times_all_end(tmp_path):
    project = mini(tmp_path / "repo")
    words = ["-S", f"a={','.join(map(str, range(100)))}", "--jobs", "2"]
    chance, seen = random.Random(0), []
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-m", "pipeline", "sweep", *words],
            cwd=project,
            env={**environment(project), "PYTHONPATH": python_path(ROOT)},
            stdout=subprocess.DEVNULL,
        ) as running:
            time.sleep(40 + 30 * chance.random())
            running.send_signal(signal.SIGKILL)
        seen.append(len(results(project)))
    assert 0 < seen[0] < seen[1] < seen[2] < 100
    done = sweep(project, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"100 runs, {seen[2]} already finished")
    assert results(project) == {f"a-{a}": 2 * a for a in range(100)}


# The graph itself, below a repository's root


def project_in(root: Path, below: str, params: dict[str, Any], subdir: bool) -> Path:
    """Make a repository with a DVC project in a folder, whose DVC is its own or the root's."""
    made = root.parent / "made"
    new_repository(made, params)
    (root / below).parent.mkdir(parents=True)
    made.rename(root / below)
    subprocess.run(["rm", "-rf", str(root / below / ".git")], check=True)
    git(root, "init", "--quiet")
    if not subdir:
        (root / below / ".dvc").rename(root / ".dvc")
        (root / below / ".dvcignore").rename(root / ".dvcignore")
    commit(root, "start")
    return root / below


@pytest.mark.long
@pytest.mark.parametrize("subdir", [True, False])
def test_a_project_below_the_root_runs_compares_and_sweeps(tmp_path, subdir):
    write_photos(tmp_path / "photos", each=12)
    params = read_params(
        prepare={"path": str(tmp_path / "photos")}, stage1={"epochs": 1}, stage2={"epochs": 1}
    )
    project = project_in(tmp_path / "größe x", "teams/vision", params, subdir)
    dvc(project, "repro")
    commit(project, "run")
    change(project, "stage2.lr", 1e-5)
    dvc(project, "repro")
    commit(project, "slower")
    said = tool(project, "compare", "HEAD~1", "HEAD")
    assert said.returncode == 0, said.stderr
    assert "stage2.lr 5e-05 → 1e-05" in said.stdout
    assert "validation images" in said.stdout
    explained = tool(project, "explain")
    assert explained.stdout.count("up to date") == 8, explained.stdout + explained.stderr
    swept = tool(project, "sweep", "-S", "seed=5,6", "--to", "probe")
    assert swept.returncode == 0, swept.stdout + swept.stderr
    assert set(results_of(project)) == {"seed-5-to-probe", "seed-6-to-probe"}


def results_of(project: Path) -> list[str]:
    return command(project, sys.executable, "-m", "dvc", "exp", "ls", "--name-only").split()


# Params that were committed without a run, and merges


@pytest.mark.long
def test_figures_that_belong_to_other_params_are_said_and_merges_end(tmp_path):
    write_photos(tmp_path / "photos", each=12)
    params = read_params(
        prepare={"path": str(tmp_path / "photos")},
        probe={"kinds": ["linear"]},
        stage1={"epochs": 1},
        stage2={"epochs": 1},
        evaluate={"views": 1},
    )
    repo = tmp_path / "repo"
    new_repository(repo, params)
    dvc(repo, "repro")
    commit(repo, "run")
    git(repo, "checkout", "--quiet", "-b", "lazy")
    change(repo, "stage2.lr", 1e-5)
    commit(repo, "params alone")
    said = tool(repo, "compare", "HEAD~1", "HEAD")
    assert "HEAD: its results were not made with its params.yaml (stage2.lr = 1e-05" in said.stderr
    assert "run with 5e-05" in said.stderr
    assert "HEAD ran with stage2.lr = " in said.stdout
    git(repo, "checkout", "--quiet", "-")

    main = git(repo, "rev-parse", "--abbrev-ref", "HEAD").strip()
    chance = random.Random(0)
    keys = [("stage2.lr", [1e-5, 2e-5, 4e-5]), ("stage2.epochs", [2, 1]),
            ("evaluate.views", [2, 1]), ("evaluate.sure_accuracy", [0.9, 0.8]),
            ("stage1.lr", [1e-3, 2e-3])]  # fmt: skip
    for i in range(10):
        ours, theirs = chance.sample(keys, 2)
        git(repo, "checkout", "--quiet", "-B", "other", main)
        for branch, (key, values) in (("other", theirs), (main, ours)):
            git(repo, "checkout", "--quiet", branch)
            present = yaml.safe_load((repo / "params.yaml").read_text())
            section, name = key.split(".")
            value = chance.choice([v for v in values if v != present[section][name]])
            change(repo, key, value)
            dvc(repo, "repro")
            commit(repo, f"{key} = {value} ({i})")
        env = environment(repo)
        merged = subprocess.run(
            ["git", "merge", "--quiet", "other"],
            cwd=repo,
            env=env,
            capture_output=True,
            check=False,
        )
        if merged.returncode:
            done = tool(repo, "merge")
            assert done.returncode == 0, done.stdout + done.stderr
            git(repo, "commit", "--quiet", "--no-edit")
        assert "Data and pipelines are up to date" in dvc(repo, "status")
        assert git(repo, "status", "--short") == ""
        reader = YAML(typ="safe")  # DVC's: to YAML 1.1, 5e-05 is text
        present = reader.load((repo / "params.yaml").read_text())
        lock = (repo / "dvc.lock").read_text()
        assert "<<<<" not in lock
        for stage in reader.load(lock)["stages"].values():
            for key, value in stage.get("params", {}).get("params.yaml", {}).items():
                at: Any = present
                for part in key.split("."):
                    at = at[part]
                assert at == value
    assert os.environ.get("GIT_DIR") is None
