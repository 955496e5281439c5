"""Killed is paused: a stage goes on where it was and ends with the same bytes."""

import json
import os
import shutil
import time
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STAGES, paths, read_params
from torch import nn

from pipeline.stage_runtime import resume as states
from pipeline.stage_runtime.cache_entries import hold
from pipeline.stage_runtime.resume import Resume, held_resume
from pipeline.stage_runtime.schema import arguments
from pipeline.training.fit import Recipe, fit
from pipeline.training.resume_state import Kept, Position, ResumeState
from pipeline.training.trunk_cache import cached_outputs

RESUMING = [name for name, stage in STAGES.items() if "resume" in signature(stage).parameters]
RESUMING.remove("prepare")  # by shards: test_pack.py


class Killed(BaseException):
    """Ends a stage as nothing in it expects."""


def kill_at(monkeypatch: pytest.MonkeyPatch, what: Any, name: str, time: int) -> list[int]:
    """Make a function end the stage after it was called so often; gives the count of its calls."""
    real, calls = getattr(what, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        calls[0] += 1
        if calls[0] == time:
            raise Killed
        return result

    monkeypatch.setattr(what, name, counted)
    return calls


def call(folder: Path, ways: dict[str, Path], name: str, params: dict[str, Any]) -> None:
    stage = STAGES[name]
    stage(**ways, **arguments(stage, params), resume=Resume(folder / "state"))


def ways_of(finished: Path, name: str, folder: Path) -> dict[str, Path]:
    """Give a stage the finished run's inputs, and places of its own for its outputs."""
    outs = {way: folder / way for way in ("out", "final") if way in paths(finished)[name]}
    return {**paths(finished)[name], **outs}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.parametrize("name", RESUMING)
def test_a_stage_killed_after_a_save_ends_with_the_same_bytes(
    name, time, finished, tmp_path, monkeypatch
):
    monkeypatch.setenv("PIPELINE_SAVE_SECONDS", "0")  # at every step
    params = read_params(prepare={"path": str(finished / "photos")})
    ways = ways_of(finished, name, tmp_path)
    with monkeypatch.context() as patch:
        if name in ("stage1", "stage2"):
            kill_at(patch, ResumeState, "save", time)
        elif name == "probe":
            kill_at(patch, Resume, "remember", time)
        else:
            kill_at(patch, Resume, "_record", time)
        with pytest.raises(Killed):
            call(tmp_path, ways, name, params)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)  # as DVC does before it starts a stage
    call(tmp_path, ways, name, params)
    for way in ("out", "final"):
        if way in ways:
            expected = contents(paths(finished)[name][way])
            expected.pop("index.html", None)  # of the stage that writes there after it
            assert expected == contents(ways[way])


def test_what_was_done_before_the_kill_is_not_done_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PIPELINE_SAVE_SECONDS", "0")
    asked = []

    def rows(first):
        for i in range(first, 10):
            asked.append(i)
            if asked == [0, 1, 2, 3]:
                raise Killed
            yield [np.full((1, 2), i)]

    with pytest.raises(Killed):
        Resume(tmp_path).filled(["x"], 10, rows)
    (array,) = Resume(tmp_path).filled(["x"], 10, rows)
    assert asked == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    assert np.array_equal(array, np.arange(10)[:, None].repeat(2, 1))
    Resume(tmp_path).filled(["x"], 10, rows)
    assert len(asked) == 11


@pytest.mark.parametrize("damage", ["cut off", "gone", "other length"])
def test_an_array_that_is_not_whole_is_filled_anew(damage, tmp_path):
    def rows(first):
        yield [np.arange(first, 9)[:, None]]

    file = Resume(tmp_path).file("x")
    Resume(tmp_path).filled(["x"], 9, rows)
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "gone":
        file.unlink()
    else:
        np.save(file, np.zeros((5, 1)))
    assert not Resume(tmp_path).is_filled("x", 9)
    (array,) = Resume(tmp_path).filled(["x"], 9, rows)
    assert np.array_equal(array[:, 0], np.arange(9))


@pytest.mark.parametrize("time", [1, 2])
def test_a_killed_pass_through_the_trunk_goes_on(time, tmp_path, monkeypatch):
    monkeypatch.setenv("PIPELINE_SAVE_SECONDS", "0")
    asked = []

    def compute(views, rows):
        asked.append(int(rows[0]))
        values = torch.from_numpy(rows)[:, None, None, None].expand(-1, 2, 3, 3)
        return [(values * 10 + view).to(torch.bfloat16) for view in views]

    with monkeypatch.context() as patch:
        kill_at(patch, Resume, "_record", time)
        with pytest.raises(Killed):
            cached_outputs(compute, 90, 2, "key", "trunk")
    asked.clear()
    batch = cached_outputs(compute, 90, 2, "key", "trunk")
    assert [0, *range(32 * time, 90, 32)] == asked  # the first is a look at the shape
    rows = np.array([89, 0, 33])
    assert torch.equal(batch(2, rows), compute([2], rows)[0])


# Training, against a run that nobody disturbs


def recipe(**changes: Any) -> Recipe:
    settings = {
        "epochs": 3,
        "batch_size": 4,
        "optimizer": "adamw",
        "lr": 0.01,
        "layer_decay": 1.0,
        "weight_decay": 0.1,
        "momentum": 0.9,
        "schedule": "cosine",
        "warmup_epochs": 1.0,
        "step_epochs": 1,
        "gamma": 0.1,
        "label_smoothing": 0.0,
        "average_epochs": 0.5,
    }
    return Recipe(**{**settings, **changes})


def small_network() -> nn.Module:
    torch.manual_seed(0)
    convolved = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)
    network = nn.Sequential(*convolved, nn.Flatten(), nn.Linear(8, 2))
    return network.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kill", [1, 3, 4, 8])
def test_training_killed_within_an_epoch_goes_on_to_the_same_bits(
    optimizer, kill, tmp_path, monkeypatch
):
    """With dropout, statistics of batches, and the moments of an optimiser in channels-last."""
    monkeypatch.setenv("PIPELINE_SAVE_SECONDS", "0")
    images = torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = images.to(memory_format=torch.channels_last)
    labels = np.arange(16) % 2

    def train(network, resume_state):
        how = recipe(optimizer=optimizer)
        weights = np.ones(16)
        epochs = fit(
            network, network, lambda _, r: images[r], labels, weights, how, 0, resume_state
        )
        return [(e.epoch, e.lr, e.loss, e.accuracy, network[0].weight.tolist()) for e in epochs]

    undisturbed = small_network()
    expected = train(undisturbed, None)
    assert expected[-1][-1] != undisturbed[0].weight.tolist()  # but their average
    start = small_network().state_dict()
    # BatchNorm takes away what a bias before it adds: its gradient is zero.
    weights = {name: p for name, p in undisturbed.named_parameters() if p.ndim > 1}
    assert not any(torch.equal(p, start[name]) for name, p in weights.items())
    file = tmp_path / "training.safetensors"
    with monkeypatch.context() as patch:
        kill_at(patch, ResumeState, "save", kill)
        with pytest.raises(Killed):
            train(small_network(), ResumeState(file))
    resumed = small_network()
    found = train(resumed, ResumeState(file))
    assert found == expected[kill // 4 :]
    state = resumed.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in undisturbed.state_dict().items())


def test_a_damaged_resume_state_is_said_and_training_starts_anew(tmp_path, capsys):
    file = tmp_path / "training.safetensors"
    network = small_network()
    resume_state = ResumeState(file)
    resume_state.kept = Kept({"rows": [1]}, network.state_dict())
    resume_state.save(network, torch.optim.SGD(network.parameters()), Position(2))
    assert ResumeState(file).kept.facts == {"rows": [1]}
    file.write_bytes(file.read_bytes()[:-100])
    assert ResumeState(file).kept.facts == {}
    assert "damaged" in capsys.readouterr().out


# What a state belongs to


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "in").mkdir()
    (folder / "in" / "a").write_text("a")
    return folder


def state() -> Path:
    return opened("stage", {"lr": 0.1}, [Path("in")])


def opened(stage: str, arguments: dict[str, Any], *paths: list[Path]) -> Path:
    """Hold a state for a moment, as a run that is killed at once does."""
    with held_resume(stage, arguments, *paths) as resume:
        return resume.folder


def finish(stage: str, arguments: dict[str, Any]) -> Path:
    """Finish a stage that writes two files."""
    Path("out").mkdir(exist_ok=True)
    Path("out/model").write_text("model")
    Path("timing.json").write_text(f"{stage}, {arguments}")
    with held_resume(stage, arguments, []) as resume:
        resume.keep([Path("out")], Path("timing.json"), 0)
        return resume.folder


def kept(resume: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((resume / "kept.json").read_text())
    return found


def test_a_state_belongs_to_params_code_inputs_and_threads(project, monkeypatch):
    states_seen = {state(), state()}
    states_seen.add(opened("stage", {"lr": 0.2}, [Path("in")]))
    states_seen.add(opened("other", {"lr": 0.1}, [Path("in")]))
    (project / "in" / "a").write_text("b")
    states_seen.add(state())
    (project / "in" / "a").rename(project / "in" / "c")
    states_seen.add(state())
    monkeypatch.setenv("PIPELINE_THREADS", "3")
    states_seen.add(state())
    code = project / "code"
    code.mkdir()
    (code / "stage.py").write_text("pass")
    monkeypatch.setattr(states, "own_code", lambda: [code / "stage.py"])
    monkeypatch.setattr(states, "CODE", code)
    states_seen.add(state())
    (code / "stage.py").write_text("pass  # changed")
    states_seen.add(state())
    assert len(states_seen) == 8


def test_a_state_belongs_to_no_folder_and_to_no_times_of_inputs(project, monkeypatch):
    expected = state()
    monkeypatch.chdir(shutil.copytree(project, project.parent / "copy"))
    os.utime("in/a", (1, 1))
    assert state() == expected
    assert opened("stage", {"lr": 0.1}, [Path("in").absolute()]) != expected


def test_images_that_are_read_once_count_by_their_sizes_and_times(project):
    (project / "in" / "a").write_text("a")
    os.utime("in/a", (1, 1))
    expected = opened("stage", {}, [], [Path("in")])
    (project / "in" / "a").write_text("b")
    os.utime("in/a", (1, 1))
    assert opened("stage", {}, [], [Path("in")]) == expected
    os.utime("in/a", (2, 2))
    assert opened("stage", {}, [], [Path("in")]) != expected


def test_outputs_are_kept_until_dvc_has_recorded_them(project):
    (project / "out").mkdir()
    (project / "out" / "others").write_text("of another stage")
    os.utime(project / "out" / "others", (1, 1))
    resume = Resume(state())
    resume.filled(["x"], 1, lambda first: [[np.ones((1, 1))]])
    since = (project / "out" / "others").stat().st_ctime + 2
    (project / "out" / "model").write_text("model")
    (project / "timing.json").write_text("12.3")
    os.utime(project / "out" / "model")
    resume.keep([Path("out")], Path("timing.json"), since - 1.5)
    assert sorted(p.name for p in resume.folder.iterdir()) == ["kept.json", "outs"]

    shutil.rmtree(project / "out")
    (project / "timing.json").unlink()
    assert Resume(state()).put_back()
    assert (project / "out" / "model").read_text() == "model"
    assert (project / "timing.json").read_text() == "12.3"

    record(resume.folder)
    assert not Resume(state()).put_back()


def record(*finished: Path) -> None:
    """Record finished stages as DVC does."""
    lines = [f"    - md5: {kept(folder)['recorded']}\n" for folder in finished]
    Path("dvc.lock").write_text("stages:\n  stage:\n    outs:\n" + "".join(lines))


def test_no_run_deletes_a_state_that_another_goes_on_with(project):
    """Three at once, and three that were killed; each has another param."""
    with ExitStack() as alive:
        held = [alive.enter_context(held_resume("stage", {"lr": i}, [])).folder for i in range(3)]
        killed = [opened("stage", {"lr": i}, []) for i in range(3, 6)]
        for i, folder in enumerate([*held, *killed]):
            (folder / "state").write_text("how far it got")
            os.utime(folder, (i + 1, i + 1))
        opened("stage", {"lr": 6}, [])
        assert all((folder / "state").exists() for folder in (*held, *killed))


def test_a_finished_state_goes_when_it_is_recorded_here_or_after_a_day(project):
    finished = [finish("stage", {"lr": i}) for i in range(4)]
    other = finish("other", {})
    record(finished[0], other)
    os.utime(finished[1] / "kept.json", (time.time() - 25 * 3600,) * 2)
    with held_resume("stage", {"lr": 2}, []) as resume:
        assert resume.put_back()
    # Who waits for the other stage's may still take it.
    assert [f.exists() for f in (*finished, other)] == [False, False, True, True, True]


def test_a_finished_state_that_a_run_holds_stays(project):
    folder = finish("stage", {})
    record(folder)
    with hold(folder, "another run"):
        opened("stage", {"lr": 1}, [])
        assert (folder / "kept.json").exists()
    opened("stage", {"lr": 1}, [])
    assert not folder.exists()


def test_states_that_no_run_holds_fit_into_the_cache(project, monkeypatch):
    folders = [opened("stage", {"lr": i}, []) for i in range(4)]
    for i, folder in enumerate(folders):
        (folder / "state").write_bytes(bytes(100_000))
        os.utime(folder, (i + 1, i + 1))
    monkeypatch.setenv("PIPELINE_CACHE_GB", "0.00025")
    with hold(folders[1], "another run"):
        os.utime(folders[1], (2, 2))
        opened("stage", {"lr": 0}, [])  # its own is never deleted, and counts for nothing
        assert [f.exists() for f in folders] == [True, True, True, True]
        os.utime(folders[0], (1, 1))
        opened("stage", {"lr": 5}, [])
    assert [f.exists() for f in folders] == [False, True, True, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the first run is a fork of this process")
def test_who_asks_for_what_another_run_computes_waits_and_takes_it(project, capfd):
    """Two processes in two folders, as two clones with one cache are."""
    first = os.fork()
    if not first:
        try:
            with held_resume("stage", {}, []) as resume:
                Path("started").touch()
                time.sleep(1)
                Path("out").mkdir()
                Path("out/model").write_text("of the first")
                Path("timing.json").write_text("1.0")
                resume.keep([Path("out")], Path("timing.json"), 0)
        finally:
            os._exit(0)
    while not Path("started").exists():
        time.sleep(0.01)
    elsewhere = project.parent / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    with held_resume("stage", {}, []) as resume:
        assert resume.put_back()
    assert os.waitpid(first, 0)[1] == 0
    assert (elsewhere / "out" / "model").read_text() == "of the first"
    said = capfd.readouterr().out
    assert said.count("stage: another run is computing the same; waiting for it") == 1


@pytest.mark.parametrize(
    "damage", ["no files", "half of an output", "kept.json", "progress.json", "a value"]
)
def test_a_damaged_state_starts_anew(damage, project):
    folder = finish("stage", {})
    if damage == "no files":
        shutil.rmtree(folder)
        folder.mkdir()
    elif damage == "half of an output":
        (folder / "outs" / "0").unlink()
    elif damage == "kept.json":
        (folder / "kept.json").write_bytes(b"\xff{")
    else:
        shutil.rmtree(folder)
        Resume(folder).remember("x", lambda: 1)
        Resume(folder).filled(["x"], 1, lambda first: [[np.ones(1)]])
        file = folder / "progress.json"
        if damage == "a value":
            [file] = (folder / "values").iterdir()
        file.write_text('{"x"')
    with held_resume("stage", {}, []) as resume:
        assert not resume.put_back()
        assert resume.remember("x", lambda: 2) == (1 if damage == "progress.json" else 2)
        (array,) = resume.filled(["x"], 2, lambda first: [[np.full(2, 7.0)]])
        assert array.tolist() == [7.0, 7.0]
