"""Backbones are ranked by their probes, and the first of many is not called better by chance."""

import json

import numpy as np
import pytest
from repository import change, commit, dvc, tool

from pipeline.commands.rank import Probed, ranked, table


def probed(
    name: str, right: "np.typing.ArrayLike", seconds: float = 0.01, start: int = 0
) -> Probed:
    """A run whose probe has the images right where there is a 1; each image its own group."""
    answers = {f"{start + i}": bool(one) for i, one in enumerate(np.asarray(right))}
    groups = {image: i for i, image in enumerate(answers)}
    accuracy = float(np.mean(list(answers.values())))
    facts = (accuracy, seconds, 224, 4_650_000, "apache-2.0")
    return Probed(name, f"timm/{name}", "imagenet", *facts, answers, groups)


def drawn(seed: int, share: float, n: int = 400) -> "np.typing.NDArray[np.bool_]":
    return np.random.default_rng(seed).random(n) < share


def test_the_best_comes_first_and_each_is_compared_with_it():
    runs = [
        probed("weak", drawn(1, 0.6)),
        probed("good", drawn(2, 0.9)),
        probed("fair", drawn(3, 0.89)),
    ]
    found = ranked(runs)
    assert [run.name for run, _ in found] == ["good", "fair", "weak"] or [
        run.name for run, _ in found
    ] == ["fair", "good", "weak"]
    (_, first), (_, second), (_, third) = found
    assert first is None
    assert second is not None
    assert third is not None
    assert second.noise is True
    assert third.noise is False
    assert third.accuracy < -0.2
    assert third.low is not None
    assert third.low < third.accuracy < (third.high or 0) < 0


def test_of_those_that_noise_cant_tell_apart_the_fastest_is_named():
    same = drawn(1, 0.9)
    runs = [
        probed("slow", same, 0.05),
        probed("quick", same ^ (np.arange(400) < 2), 0.01),
        probed("poor", drawn(4, 0.5), 0.001),
    ]
    lines = table(ranked(runs))
    assert lines[-1].startswith("2 of 3 can't be told from the first; of these, quick")
    assert "no more than noise" in lines[2]
    assert ": more than noise" in lines[3]


def test_other_training_images_are_not_compared():
    (_, _), (_, behind) = ranked([probed("a", drawn(1, 0.9)), probed("b", drawn(2, 0.5), start=7)])
    assert behind is not None
    assert behind.noise is None
    assert "can't be distinguished from noise" in "\n".join(
        table(ranked([probed("a", drawn(1, 0.9)), probed("b", drawn(2, 0.5), start=7)]))
    )


def test_the_first_of_ten_that_are_equally_good_is_seldom_called_better():
    """The first is chosen by the images that it is then compared on."""
    wrong = 0
    for seed in range(100):
        runs = [probed(f"r{i}", drawn(100 * seed + i, 0.8, 150)) for i in range(10)]
        wrong += any(behind is not None and behind.noise is False for _, behind in ranked(runs))
    assert wrong <= 10  # 5 % of 100 are 5; more than 10 have a probability of 1 %


def test_a_run_is_ranked_by_its_own_figures(repo):
    done = tool(repo, "rank", "HEAD", ".", "--json")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    probe = json.loads((repo / "models/probe/metrics.json").read_text())["probe"]
    speed = json.loads((repo / "models/extract/timing.json").read_text())["extract"]
    for run in (first, second):
        assert run["accuracy"] == pytest.approx(
            probe["cv_accuracy"], abs=0.05
        )  # folds differ in size
        assert run["seconds"] == pytest.approx(1 / speed["images_per_second"])
        assert run["low"] < run["accuracy"] <= run["high"]
    assert {first["name"], second["name"]} == {"HEAD", "here"}
    assert first["against_first"] is None
    assert second["against_first"]["noise"] is True


def test_figures_of_other_params_are_not_ranked(repo):
    change(repo, "extract.views", 2)
    commit(repo, "params alone")
    done = tool(repo, "rank", "HEAD")
    assert done.returncode == 1
    assert "HEAD: its probe belongs to other params; run `dvc repro`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_sweep_up_to_the_probe_is_ranked(repo):
    change(repo, "backbone.weights", "none")  # not the file of the tests' own network
    change(repo, "backbone.sha256", "")
    commit(repo, "from scratch")
    names = ("timm/test_vit", "timm/test_convnext", "timm/test_resnet")
    done = tool(repo, "sweep", "-S", f"backbone.name={','.join(names)}", "--to", "probe")
    assert done.returncode == 0, done.stdout + done.stderr
    done = tool(repo, "rank", "--json")
    assert done.returncode == 0, done.stderr
    lines = tool(repo, "rank").stdout.splitlines()
    assert lines[0].split()[:3] == ["run", "backbone", "accuracy"]
    assert len(lines) == 1 + len(names) + 2  # an empty line and what follows are the last two
    found = json.loads(done.stdout)
    assert sorted(run["backbone"] for run in found) == sorted(names)
    assert "left out: HEAD: its probe belongs to other params" in done.stderr
    accuracies = [run["accuracy"] for run in found]
    assert accuracies == sorted(accuracies, reverse=True)
    # A later graph takes the chosen one's codes from the cache.
    dvc(repo, "exp", "apply", next(run["name"] for run in found if run["backbone"] in names))
    assert "Stage 'extract' didn't change" in dvc(repo, "repro", "extract")
