"""Runs side by side: the figures are the runs' own, and noise is called noise."""

import csv
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from repository import dvc, git, tool
from scipy.stats import ttest_ind

from pipeline.compare import (
    MODELS,
    Run,
    against,
    by_seed,
    changed,
    corrected,
    holm,
    read,
    said,
    seeds,
    table,
)


def compare(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return tool(folder, "compare", *words)


def run_of(name: str, right: str, seed: int = 0, groups: int = 40, start: int = 0) -> Run:
    """A run whose probe has the images right where there is a 1."""
    answers = {f"{start + i}": c == "1" for i, c in enumerate(right)}
    accuracy = right.count("1") / len(right)
    scores = {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1}
    of = {image: i % groups for i, image in enumerate(answers)}
    return Run(
        name, {"seed": seed, "stage2.lr": 5e-5}, "probe", {"probe": scores}, {"probe": answers}, of
    )


def test_a_commit_and_the_folder_are_compared_by_their_own_figures(repo):
    file = repo / "models/report/metrics.json"
    done = compare(repo, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tested = json.loads(file.read_text())["test"]
    assert list(found["runs"]) == ["HEAD", "here"]
    assert found["runs"]["HEAD"]["test"] == found["runs"]["here"]["test"] == tested
    assert {one["model"] for one in found["against"]} == set(tested)
    assert all(one["accuracy"] == 0 and one["noise"] for one in found["against"])


def test_the_commands_lines_hold_every_run_and_what_changed(repo):
    git(repo, "branch", "other")
    text = (repo / "params.yaml").read_text()
    (repo / "params.yaml").write_text(text.replace("svm_max_images: 4000", "svm_max_images: 999"))
    done = compare(repo, "other", ".")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["test", "accuracy", "other", "here"]
    assert "here against other: probe.svm_max_images 4000 → 999" in lines
    assert sum(line.endswith("no more than noise") for line in lines) == 4


@pytest.mark.parametrize(
    ("revision", "line"),
    [("nowhere", "error: nowhere: no run to read ("), ("HEAD~1", "error: HEAD~1: ")],
)
def test_a_revision_without_a_run_is_named(revision, line, repo):
    done = compare(repo, revision)
    assert done.returncode == 1
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_run_whose_predictions_are_not_here_is_compared_by_its_intervals(repo):
    shutil.rmtree(repo / ".dvc/cache")
    done = compare(repo, "HEAD", ".")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert done.stderr == "HEAD: its predictions aren't here (`dvc fetch` may have them)\n"
    assert sum("by their intervals): no more than noise" in line for line in lines) == 4


def test_the_right_answers_are_those_of_the_predictions(repo, monkeypatch):
    monkeypatch.chdir(repo)
    run = read(".")
    with (repo / "models/report/predictions.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    for model in run.test:
        right = [row[model] == row["label"] for row in rows]
        assert np.mean(right) == pytest.approx(run.test[model]["accuracy"])
        assert sorted(run.right[model].values()) == sorted(right)


def test_on_the_same_images_the_test_is_paired():
    """Ten images better and none worse: two-sided p is 2 / 2^10, though the intervals overlap."""
    base, run = run_of("a", "1" * 30 + "0" * 10), run_of("b", "1" * 40)
    [found] = against(run, base)
    assert found.accuracy == pytest.approx(0.25)
    assert found.p_value == pytest.approx(2 / 2**10, abs=1e-3)
    assert not found.noise
    assert said(found).endswith("more than noise")


def test_on_other_images_the_intervals_decide():
    base, run = run_of("a", "1" * 30 + "0" * 10), run_of("b", "1" * 32 + "0" * 8, start=100)
    [found] = against(run, base)
    assert found.p_value is None
    assert found.high - found.accuracy == pytest.approx(0.1 * 2**0.5)
    assert found.noise
    far = run_of("c", "1" * 38 + "0" * 2, start=100)
    assert not next(against(far, base)).noise


def test_p_values_are_raised_by_holms_method():
    """Worked by hand: sorted .01, .03, .04 times 3, 2, 1, and never falling."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_difference_that_is_one_of_many_may_be_noise():
    base, run = run_of("a", "1" * 34 + "0" * 6), run_of("b", "1" * 40)
    [alone] = against(run, base)
    assert alone.p_value is not None
    assert alone.p_value < 0.05 < 2 * alone.p_value
    assert [one.noise for one in corrected([alone, alone])] == [True, True]
    assert [one.noise for one in corrected([alone])] == [False]


def test_runs_that_differ_in_their_seed_alone_are_put_together():
    runs = [run_of(f"r{i}", "1" * (30 + i) + "0" * (10 - i), seed=i) for i in range(3)]
    other = replace(runs[0], name="other", params={**runs[0].params, "stage2.lr": 1e-5})
    groups = by_seed([*runs, other])
    assert [[run.name for run in group] for group in groups] == [["r0", "r1", "r2"], ["other"]]
    only_probe = [
        [replace(r, test=dict.fromkeys(MODELS, r.test["probe"])) for r in g] for g in groups
    ]
    head, first, second = seeds(only_probe)
    assert head.split() == ["over", "seeds", "n", *MODELS, "chosen"]
    assert first.split() == ["3", *["0.7750", "±", "0.0250"] * 5, "as", "r0"]
    assert second.split() == ["1", *["0.7500"] * 5, *["stage2.lr", "5e-05", "→", "1e-05"]]
    assert changed(other, runs[0]) == ["stage2.lr 5e-05 → 1e-05"]


def test_the_table_keeps_its_columns():
    lines = table([run_of("a", "1110"), run_of("b" * 50, "1100")])
    assert lines[0].split() == ["test", "accuracy", "a", "b" * 50]
    assert lines[2].startswith("probe          0.7500 (0.650 to 0.850)  0.5000 (0.400 to 0.600)")


def test_groups_of_seeds_are_compared_by_welchs_test():
    def group(lr: float, rights: list[int]) -> list[Run]:
        runs = [run_of(f"{lr}-{n}", "1" * n + "0" * (40 - n), seed=n) for n in rights]
        return [
            replace(
                run,
                params={**run.params, "stage2.lr": lr},
                test=dict.fromkeys(MODELS, run.test["probe"]),
            )
            for run in runs
        ]

    first, second = group(1e-5, [20, 21, 22]), group(5e-5, [30, 31, 32])
    p = ttest_ind([0.75, 0.775, 0.8], [0.5, 0.525, 0.55], equal_var=False).pvalue
    assert f"p = {p:.3f}: more than noise  stage2.lr 1e-05 → 5e-05" in seeds([first, second])[2]
    assert "no more than noise" in seeds([first, group(5e-5, [20, 21, 23])])[2]


def test_of_many_runs_each_has_a_line_and_only_what_is_clear_is_named(repo):
    for name in ("one", "two"):
        git(repo, "branch", name)
    done = compare(repo, "HEAD", "one", "two", ".")
    lines = done.stdout.splitlines()
    tested = json.loads((repo / "models/report/metrics.json").read_text())
    expected = [f"{tested['test'][model]['accuracy']:.4f}" for model in MODELS]
    assert [line.split() for line in lines[1:5]] == [
        [name, *expected, tested["chosen"]] for name in ("HEAD", "one", "two", "here")
    ]
    assert "of 12 comparisons with HEAD, more than noise: 0" in lines


def test_all_experiments_on_the_last_commit_are_found(repo):
    assert "no experiments on the last commit" in compare(repo, "--experiments").stderr
    for name, value in (("slow", "1e-5"), ("fast", "1e-4")):
        dvc(repo, "exp", "run", "--name", name, "--set-param", f"stage2.lr={value}")
    done = compare(repo, "--experiments")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["test", "accuracy", "HEAD", "fast", "slow"]
    assert "slow against HEAD: stage2.lr 5e-05 → 1e-05" in done.stdout
