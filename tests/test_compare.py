"""Runs side by side: the figures are the runs' own, and noise is called noise."""

import csv
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import read_params, write_photos
from repository import commit, dvc, git, new_repository, tool
from scipy.stats import binomtest

from pipeline.commands.compare import (
    COST,
    MODELS,
    Run,
    against,
    by_seed,
    changed,
    corrected,
    of_seeds,
    read,
    said,
    seeds,
    table,
)
from pipeline.commands.differences import interval
from pipeline.commands.folds import differences_of, folds_of, of_folds, pooled
from pipeline.statistics.significance import accuracy_interval, difference, holm, over_resplits


def compare(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return tool(folder, "compare", *words)


def run_of(name: str, right: str, seed: int = 0, groups: int = 40, start: int = 0) -> Run:
    """A run whose stage 1 has the validation images right where there is a 1."""
    answers = {f"{start + i}": c == "1" for i, c in enumerate(right)}
    of = {image: i % groups for i, image in enumerate(answers)}
    return Run(
        name,
        {"seed": seed, "stage2.lr": 5e-5},
        "stage1",
        {"stage1": right.count("1") / len(right)},
        {"validation": {"stage1": answers}},
        of,
        {"train": 120, "val": len(right)},
    )


def fold_of(number: int, of: int, right: str, chosen: str = "stage1", lr: float = 5e-5) -> Run:
    """A run that tests one fold, of images in pairs, and whose models are right where there is a 1.

    Stage 2 has the opposite ones right.
    """
    names = [f"{number}-{i}" for i in range(len(right))]
    answers = {name: c == "1" for name, c in zip(names, right, strict=True)}
    other = {name: not found for name, found in answers.items()}
    # As in index.csv, the groups are those of all images of the set.
    groups = {f"{n}-{i}": 100 * n + i // 2 for n in range(1, of + 1) for i in range(len(right))}
    return Run(
        f"fold {number} at {lr}",
        {"prepare.test_fold": f"{number}/{of}", "seed": 0, "stage2.lr": lr},
        chosen,
        {"stage1": right.count("1") / len(right), "stage2": right.count("0") / len(right)},
        {"test": {"stage1": answers, "stage2": other}},
        groups,
        {"train": 10, "val": 2, "test": len(right)},
    )


def test_folds_are_put_together_into_one_accuracy_with_one_interval():
    rights = ["1110", "1111", "1100"]
    runs = [fold_of(i, 3, right) for i, right in enumerate(rights, 1)]
    runs.append(run_of("no fold", "1110"))
    [folds] = folds_of(runs)
    found = folds.facts()
    pooled_right = np.array([c == "1" for right in rights for c in right])
    low, high = accuracy_interval(pooled_right, np.arange(12) // 2)
    assert found["accuracy"]["stage1"] == {"accuracy": 9 / 12, "low": low, "high": high}
    assert found["accuracy"]["stage2"]["accuracy"] == 3 / 12
    assert (found["folds"], found["of"], found["images"], found["groups"]) == (3, 3, 12, 6)
    lines = pooled([folds])
    assert "3 of 3" in lines[1]
    assert "12 in 6 groups" in lines[2]
    assert "share training images" in lines[-1]


def test_the_final_model_of_each_fold_is_its_own_and_a_missing_fold_is_told():
    runs = [fold_of(1, 4, "1110"), fold_of(2, 4, "0001", chosen="stage2"), fold_of(4, 4, "1100")]
    [folds] = folds_of(runs)
    assert folds.facts()["accuracy"]["chosen"]["accuracy"] == (3 + 3 + 2) / 12
    assert "3 of 4" in pooled([folds])[1]
    # One alone is no group, and neither are folds of two different numbers.
    assert folds_of(runs[:1]) == []
    assert folds_of([runs[0], fold_of(2, 5, "1110")]) == []


def test_two_groups_of_folds_are_compared_image_by_image():
    ours = [fold_of(i, 3, "1111" * 20, lr=1e-5) for i in (1, 2, 3)]
    base = [fold_of(i, 3, "1110" * 20) for i in (1, 2, 3)]
    groups = folds_of([*base, *ours])
    [one] = of_folds(groups)
    assert one.accuracy == pytest.approx(0.25)
    assert one.noise is False
    assert one.on == "240 test images of all folds"
    first, second = differences_of(groups, [one])
    assert "stage2.lr 5e-05 → 1e-05" in first
    assert "test_fold" not in first
    assert "more than noise" in second
    # Other images can't be compared.
    assert of_folds(folds_of([*base, *ours[:2]])) == []


def test_ten_folds_of_the_same_accuracy_have_half_of_ones_interval():
    chance = np.random.default_rng(0)
    rights = ["".join(chance.choice(["1", "0"], 262, p=[0.85, 0.15])) for _ in range(10)]
    runs = [fold_of(i, 10, right) for i, right in enumerate(rights, 1)]
    [folds] = folds_of(runs)
    of_all = folds.facts()["accuracy"]["stage1"]
    widths = []
    for run in runs:
        right = run.right["test"]["stage1"]
        low, high = interval(right, run.groups)
        widths.append(high - low)
    assert of_all["high"] - of_all["low"] < np.mean(widths) / 2


@pytest.mark.long
def test_a_sweep_over_folds_tests_each_image_once(tmp_path):
    write_photos(tmp_path / "photos", each=12)
    params = read_params(
        prepare={"path": str(tmp_path / "photos")}, stage1={"epochs": 1}, stage2={"epochs": 1}
    )
    new_repository(tmp_path / "repo", params)
    repo = tmp_path / "repo"
    dvc(repo, "repro")
    commit(repo, "run")
    swept = tool(repo, "sweep", "-S", "prepare.test_fold=*/3")
    assert swept.returncode == 0, swept.stdout + swept.stderr
    done = compare(repo, "--experiments", "--test", "--json")
    assert done.returncode == 0, done.stderr
    [folds] = json.loads(done.stdout)["folds"]
    assert (folds["folds"], folds["of"], folds["images"]) == (3, 3, 24)
    lines = compare(repo, "--experiments", "--test").stdout.splitlines()
    assert any(line.split()[:1] == ["folds"] and "3 of 3" in line for line in lines)
    without = compare(repo, "--experiments")
    assert "--test puts their test images together" in without.stderr
    assert "all folds together" not in without.stdout


def test_a_commit_and_the_folder_are_compared_by_their_validation_figures(repo):
    done = compare(repo, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    validated = json.loads((repo / "models/report/metrics.json").read_text())["val"]
    assert found["judged_by"] == "validation"
    assert list(found["runs"]) == ["HEAD", "here"]
    for run in found["runs"].values():
        assert run["accuracy"] == validated
    assert {one["model"] for one in found["against"]} == set(validated)
    assert all(one["accuracy"] == 0 and one["noise"] for one in found["against"])
    on = {one["model"]: one["on"].partition(" ")[2] for one in found["against"]}
    assert on["probe"] == on["probe_linear"] == "training images, out of fold"
    assert on["stage1"] == on["stage2"] == "validation images"


def test_test_images_judge_only_when_they_are_asked_to_and_that_is_said(repo):
    done = compare(repo, "--json", "--test")
    found = json.loads(done.stdout)
    tested = json.loads((repo / "models/report/metrics.json").read_text())["test"]
    assert found["judged_by"] == "test"
    assert found["runs"]["here"]["accuracy"] == {m: v["accuracy"] for m, v in tested.items()}
    assert all(one["on"].endswith(" test images") for one in found["against"])
    assert done.stderr == f"{COST}\n"
    without = compare(repo)
    assert "test" not in without.stdout
    assert without.stderr == ""


def test_the_commands_lines_hold_every_run_and_what_changed(repo):
    git(repo, "branch", "other")
    text = (repo / "params.yaml").read_text()
    (repo / "params.yaml").write_text(text.replace("svm_max_images: 4000", "svm_max_images: 999"))
    done = compare(repo, "other", ".")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["validation", "accuracy", "other", "here"]
    assert "here against other: probe.svm_max_images 4000 → 999" in lines
    assert "here ran with probe.svm_max_images = 4000" in lines
    assert done.stderr == (
        "here: its results were not made with its params.yaml (probe.svm_max_images = 999, run "
        "with 4000); run `dvc repro`\n"
    )
    assert sum(line.endswith("no more than noise") for line in lines) == len(MODELS)


@pytest.mark.parametrize(
    ("revision", "line"),
    [("nowhere", "error: nowhere: no run to read ("), ("HEAD~1", "error: HEAD~1: ")],
)
def test_a_revision_without_a_run_is_named(revision, line, repo):
    done = compare(repo, revision)
    assert done.returncode == 1
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_run_whose_answers_are_not_here_is_compared_by_figures_alone(repo):
    shutil.rmtree(repo / ".dvc/cache")
    done = compare(repo, "HEAD", ".")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert done.stderr == "HEAD: data/prepared is missing (`dvc fetch` may have it)\n"
    line = "(accuracies alone): can't be distinguished from noise"
    assert sum(line in found for found in lines) == len(MODELS)


def test_a_run_without_answers_is_compared_by_figures_alone(repo):
    """As those are that were made before validation answers were written."""
    (repo / "models/report/validation.csv").unlink()
    (repo / "models/probe/out_of_fold.csv").unlink()
    done = compare(repo, "HEAD", ".")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"here: {file} is missing (`dvc fetch` may have it): accuracies alone"
        for file in ("models/probe/out_of_fold.csv", "models/report/validation.csv")
    ]
    assert done.stdout.count("(accuracies alone): can't be distinguished from noise") == len(MODELS)


def test_answers_of_other_images_than_the_index_are_named(repo):
    """An index that was made anew since, of which stages 1 and 2 know nothing yet."""
    index = repo / "data/prepared/index.csv"
    index.chmod(0o644)
    index.write_text(index.read_text().replace("class0/", "class9/"))
    for judge in ((), ("--test",)):
        done = compare(repo, *judge, "HEAD", ".")
        assert done.returncode == 0, done.stderr
        assert "has other images than data/prepared/index.csv; run `dvc repro`" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_right_answers_are_those_of_the_tables(repo, monkeypatch):
    monkeypatch.chdir(repo)
    run = read(".")
    for kind, file in (
        ("validation", "models/report/validation.csv"),
        ("out-of-fold", "models/probe/out_of_fold.csv"),
    ):
        with (repo / file).open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        for model, right in run.right[kind].items():
            expected = [row[model] == row["label"] for row in rows]
            assert sorted(right.values()) == sorted(expected)
    for model, accuracy in run.accuracies.items():
        assert np.mean(list(run.right["validation"][model].values())) == pytest.approx(accuracy)


def test_on_the_same_images_the_test_is_paired():
    """Ten images better and none worse: a sign test has 2 / 2^10."""
    base, run = run_of("a", "1" * 30 + "0" * 10), run_of("b", "1" * 40)
    [found] = against(run, base)
    assert found.accuracy == pytest.approx(0.25)
    assert found.p_value == pytest.approx(binomtest(0, 10).pvalue, abs=0.002)
    assert found.noise is False
    low, high = 100 * found.low, 100 * found.high
    interval = f"({low:+.1f} to {high:+.1f}; p = {found.p_value:.3f}; 40 validation images)"
    assert said(found) == f"stage1        +25.0 points {interval}: more than noise"


def test_groups_count_and_not_images():
    """The same answers in ten groups of four, of which two hold all that differ."""
    base, run = run_of("a", "1" * 30 + "0" * 10), run_of("b", "1" * 40)
    of = {image: int(image) // 5 for image in run.groups}
    [alone] = against(run, base)
    [grouped] = against(replace(run, groups=of), base)
    assert grouped.p_value > 10 * alone.p_value
    [none] = against(replace(run, groups=dict.fromkeys(of, 0)), base)
    assert (none.low, none.p_value, none.noise) == (None, None, None)
    assert said(none).endswith("in too few groups): can't be distinguished from noise")


def test_other_validation_images_tell_nothing_by_themselves():
    base, run = run_of("a", "1" * 30 + "0" * 10), run_of("b", "1" * 39 + "0", start=100)
    [found] = against(run, base)
    assert (found.p_value, found.noise) == (None, None)
    assert said(found).endswith("(other validation images): can't be distinguished from noise")


def test_probes_are_judged_by_what_cross_validation_held_out():
    """Validation says nothing, the 200 training images do."""

    def run(name: str, right: int) -> Run:
        made = run_of(name, "1" * 40)
        answers = {"probe": {f"t{i}": i < right for i in range(200)}}
        groups = {**made.groups, **{f"t{i}": i for i in range(200)}}
        both = {"out-of-fold": answers, "validation": {"probe": made.right["validation"]["stage1"]}}
        return replace(made, accuracies={"probe": 1.0}, right=both, groups=groups)

    [found] = against(run("b", 180), run("a", 150))
    images = np.arange(200)
    expected = difference(images < 180, images < 150, images)
    assert found.p_value == pytest.approx(expected["p_value"])
    assert found.on == "200 training images, out of fold"


def test_p_values_are_raised_by_holms_method():
    """Worked by hand: sorted .01, .03, .04 times 3, 2, 1, and never falling."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_difference_that_is_one_of_many_may_be_noise():
    base, run = run_of("a", "1" * 35 + "0" * 5), run_of("b", "1" * 40)
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
    of_all = [
        [replace(r, accuracies=dict.fromkeys(MODELS, r.accuracies["stage1"])) for r in g]
        for g in groups
    ]
    head, first, second = seeds(of_all, [])
    assert head.split() == ["over", "seeds", "n", *MODELS, "chosen"]
    assert first.split() == ["3", *["0.7750", "±", "0.0250"] * (len(MODELS) + 1), "as", "r0"]
    assert second.split() == [
        "1",
        *["0.7500"] * (len(MODELS) + 1),
        *["stage2.lr", "5e-05", "→", "1e-05"],
    ]
    assert changed(other, runs[0]) == ["stage2.lr 5e-05 → 1e-05"]


def test_the_table_keeps_its_columns():
    lines = table([run_of("a", "1110"), run_of("b" * 50, "1100")])
    assert lines[0].split() == ["validation", "accuracy", "a", "b" * 50]
    assert lines[3].startswith(
        "stage1               0.7500 (0.301 to 0.954)  0.5000 (0.150 to 0.850)"
    )


def of_rate(lr: float, rights: list[int], first: int = 0) -> list[Run]:
    """Runs of one rate, a seed each, with so many of 40 right."""
    runs = [
        run_of(f"{lr}-{n}", "1" * n + "0" * (40 - n), seed=first + i) for i, n in enumerate(rights)
    ]
    return [
        replace(
            run,
            params={**run.params, "stage2.lr": lr},
            accuracies=dict.fromkeys(MODELS, run.accuracies["stage1"]),
        )
        for run in runs
    ]


def test_seeds_are_compared_as_re_splits_of_one_set():
    """Three and more seeds don't narrow the interval as new images would (Nadeau and Bengio)."""
    first, second = of_rate(1e-5, [20, 22, 21, 24]), of_rate(5e-5, [30, 31, 32, 33])
    [found] = of_seeds([first, second])
    a, b = ([n / 40 for n in of] for of in ([30, 31, 32, 33], [20, 22, 21, 24]))
    assert found.accuracy == pytest.approx(np.mean(a) - np.mean(b))
    assert (found.low, found.high, found.p_value) == pytest.approx(
        over_resplits(a, b, 40 / 120, paired=True)
    )
    assert found.on == "4 seeds"
    line = seeds([first, second], [found])[2]
    assert f"p = {found.p_value:.3f}: more than noise  stage2.lr 1e-05 → 5e-05" in line
    [unlike] = of_seeds([first, of_rate(5e-5, [20, 23, 21], first=7)])
    assert unlike.on == "3 and 4 seeds"
    [as_many] = of_seeds([first, of_rate(5e-5, [30, 31, 32, 33], first=7)])
    assert as_many.on == "4 and 4 seeds"  # of other splits: not paired
    assert as_many.p_value == pytest.approx(over_resplits(a, b, 40 / 120, paired=False)[2])
    assert unlike.noise
    [one] = of_seeds([first, of_rate(5e-5, [30])])
    assert one.p_value is None


def test_seeds_that_both_have_are_paired():
    first, second = of_rate(1e-5, [20, 30, 25]), of_rate(5e-5, [21, 31])
    [found] = of_seeds([first, second])
    assert found.on == "2 seeds"
    assert found.accuracy == pytest.approx(1 / 40)  # on the seeds that they share


def test_comparisons_over_seeds_are_raised_with_all_others():
    [one] = of_seeds([of_rate(1e-5, [20, 22, 21, 24]), of_rate(5e-5, [30, 31, 32, 33])])
    others = [replace(one, p_value=0.5)] * 3
    raised = corrected([*others, one])[-1]
    assert raised.p_value == pytest.approx(min(1, 4 * one.p_value))


def test_of_many_runs_each_has_a_line_and_only_what_is_clear_is_named(repo):
    for name in ("one", "two"):
        git(repo, "branch", name)
    done = compare(repo, "HEAD", "one", "two", ".")
    lines = done.stdout.splitlines()
    tested = json.loads((repo / "models/report/metrics.json").read_text())
    expected = [f"{tested['val'][model]:.4f}" for model in MODELS]
    assert [line.split() for line in lines[1:5]] == [
        [name, *expected, tested["chosen"]] for name in ("HEAD", "one", "two", "here")
    ]
    assert f"of {3 * len(MODELS)} comparisons with HEAD, more than noise: 0" in lines


@pytest.mark.long
def test_all_experiments_on_the_last_commit_are_found(repo):
    assert "no experiments on the last commit" in compare(repo, "--experiments").stderr
    for name, value in (("slow", "1e-5"), ("fast", "1e-4")):
        dvc(repo, "exp", "run", "--name", name, "--set-param", f"stage2.lr={value}")
    done = compare(repo, "--experiments")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["validation", "accuracy", "HEAD", "fast", "slow"]
    assert "slow against HEAD: stage2.lr 5e-05 → 1e-05" in done.stdout
