"""What pipeline.commands.explain foretells is what DVC then does."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, STAGES
from repository import change, dvc, tool
from test_graph import stages_run


def explain(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return tool(folder, "explain", *words)


def answers(folder: Path) -> dict[str, str]:
    done = explain(folder, "--json")
    assert done.returncode == 0, done.stderr
    return {one["stage"]: one["answer"] for one in json.loads(done.stdout)}


def because(folder: Path, stage: str) -> list[str]:
    [one] = json.loads(explain(folder, stage, "--json").stdout)
    assert one["seconds"] > 0
    return one["because"]


def test_after_a_run_everything_is_up_to_date(repo):
    assert dict.fromkeys(STAGES, "up to date") == answers(repo)
    assert explain(repo).stdout.splitlines()[0].split(maxsplit=1) == ["prepare", "up to date"]


def test_a_changed_param_is_named_with_its_old_and_its_new_value(repo):
    change(repo, "stage2.lr", 1e-5)
    assert because(repo, "stage2") == ["stage2.lr: 5e-05 → 1e-05"]
    found = answers(repo)
    assert {s for s, a in found.items() if a != "up to date"} == {"stage2", "evaluate", "report"}
    assert (found["stage2"], found["evaluate"]) == ("runs", "runs perhaps")
    assert because(repo, "evaluate") == ["stage2 comes before it"]
    assert because(repo, "report") == [
        *("stage2.lr: 5e-05 → 1e-05", "stage2 comes before it", "evaluate comes before it")
    ]
    lines = explain(repo, "stage2").stdout.splitlines()
    assert lines[0].startswith("stage2  runs  (took ")


@pytest.mark.long
def test_the_run_cache_is_foretold(repo):
    rate = 5e-5
    change(repo, "stage2.lr", 1e-5)
    assert stages_run(dvc(repo, "repro")) == ["stage2", "evaluate", "report"]
    change(repo, "stage2.lr", rate)
    assert answers(repo)["stage2"] == "from the run cache"
    said = dvc(repo, "repro")
    assert "Stage 'stage2' is cached - skipping run" in said
    assert stages_run(said) == []


@pytest.mark.parametrize(
    ("spoil", "stage", "reason"),
    [
        (
            lambda repo: (repo / "data/features/facts.json").write_text("{}"),
            "extract",
            "its output data/features is not what it wrote",
        ),
        (
            lambda repo: (repo / "models/probe/probe.safetensors").unlink(),
            "probe",
            "its output models/probe/probe.safetensors is missing",
        ),
        (
            lambda repo: (repo / "pipeline/probe.py").open("a").write("# changed\n"),
            "probe",
            "pipeline/probe.py is modified",
        ),
        (
            lambda repo: (repo / "dvc.lock").unlink(),
            "stage1",
            "it has never run, or dvc.lock was lost",
        ),
    ],
    ids=["output changed", "output gone", "code changed", "no lock"],
)
def test_files_and_outputs_are_named(spoil, stage, reason, repo):
    spoil(repo)
    assert reason in because(repo, stage)
    assert answers(repo)[stage] != "up to date"


def test_nothing_is_changed_by_asking(repo):
    change(repo, "seed", 1)
    before = {str(f): f.stat().st_mtime_ns for f in repo.rglob("*") if ".dvc/tmp" not in str(f)}
    explain(repo)
    after = {str(f): f.stat().st_mtime_ns for f in repo.rglob("*") if ".dvc/tmp" not in str(f)}
    changed = {f for f in before | after if before.get(f) != after.get(f)}
    assert {f for f in changed if Path(f).is_file() and "__pycache__" not in f} == set()


def test_an_unknown_stage_is_answered_with_near_ones(repo):
    done = explain(repo, "stage3")
    assert done.stderr == "error: no stage is called 'stage3'; did you mean stage2 or stage1?\n"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("explain", "error: .: DVC can't read the graph here ("),
        ("compare", "error: HEAD: no run to read ("),
        ("cache", "error: .: "),
    ],
)
def test_a_command_says_in_a_line_where_there_is_no_project(name, line, tmp_path):
    (tmp_path / "pipeline").symlink_to(ROOT / "pipeline")
    done = tool(tmp_path, name)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(line)


def test_a_lock_file_that_dvc_did_not_write_to_its_end_is_a_line(repo):
    lock = repo / "dvc.lock"
    whole = lock.read_bytes()
    try:
        for command, length in (
            (("params", "--check"), 0),
            (("explain",), whole.rindex(b"path: ")),
        ):
            lock.write_bytes(whole[: length + 6])
            with pytest.raises(AssertionError, match=r"dvc\.lock"):  # nor can DVC read it
                dvc(repo, "status")
            done = tool(repo, *command)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert "dvc.lock: it is incomplete" in done.stderr
        lock.write_text("<<<<<<< HEAD\nschema: '2.0'\n=======\nschema: '3.0'\n>>>>>>> other\n")
        assert "run `python -m pipeline merge`" in tool(repo, "params", "--check").stderr
    finally:
        lock.write_bytes(whole)
    assert tool(repo, "params", "--check").returncode == 0


@pytest.mark.long
def test_without_its_lock_file_a_finished_run_comes_from_the_run_cache(repo):
    lock = repo / "dvc.lock"
    whole = lock.read_bytes()
    lock.unlink()
    said = dvc(repo, "repro")
    assert lock.read_bytes() == whole
    assert said.count("is cached - skipping run") == len(STAGES)
