"""dvc.yaml tells the truth, and DVC does with it what it is there for."""

import ast
import csv
import importlib.metadata
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, get_type_hints

import jinja2.meta
import pytest
import yaml
from browser import look
from conftest import PHOTOS, ROOT, STAGES, Run, paths, read_params, run
from repository import change, command, commit, dvc, environment, flat, git, hashes

from pipeline.stage_runtime.schema import TOP, AllParams, Out, path_names, stage_params
from pipeline.stage_runtime.schema import read_params as loaded

GRAPH: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
GROUPS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
GROUP = "project.optional-dependencies."
PACKAGE = {"pipeline/__init__.py"}  # a docstring
RATE = 1e-5  # another one for stage 2
IMPORT_EACH = """
import importlib, json, sys
found = {}
for stage in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] == "pipeline"]:
        del sys.modules[name]
    importlib.import_module(f"pipeline.{stage}")
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "pipeline"]
    found[stage] = [m.__file__ for m in modules if m.__file__]
json.dump(found, sys.stdout)
"""

# The code that a state belongs to, as `python -m pipeline STAGE` finds it when it starts.
START_EACH = """
import importlib, json, sys
from pathlib import Path
found = {}
for stage in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] == "pipeline"]:
        del sys.modules[name]
    import pipeline.launcher.stage
    import pipeline.launcher.supervise
    from pipeline.stage_runtime.resume import own_code
    def note(_):
        found[stage] = [str(file.relative_to(Path.cwd())) for file in own_code()]
    pipeline.launcher.stage.main = note
    pipeline.launcher.supervise.supervised = lambda name: None
    sys.argv = ["-m", stage]
    importlib.import_module("pipeline.__main__").main()
json.dump(found, sys.stdout)
"""

each_stage = pytest.mark.parametrize("stage", STAGES)


def listed(stage: str, *fields: str) -> dict[str, dict[str, Any]]:
    """Name the files under these fields of a stage, each with its options."""
    files: dict[str, dict[str, Any]] = {}
    for entry in (entry for field in fields for entry in GRAPH[stage].get(field, [])):
        files.update(entry if isinstance(entry, dict) else {entry: {}})
    return files


def imported(file: Path) -> set[str]:
    """Name all that a file may import, `from a import b` as both a and a.b, wherever it stands."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0, f"{file}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def files_of(name: str) -> set[str]:
    """List the project's files that run when a dotted name is imported: its packages' too."""
    parts = name.split(".")
    bases = ["/".join(parts[: i + 1]) for i in range(len(parts))] if parts[0] == "pipeline" else []
    files = {file for base in bases for file in (f"{base}/__init__.py", f"{base}.py")}
    return {file for file in files if (ROOT / file).exists()}


def closure(stage: str) -> set[str]:
    """List the project's files that a stage's module imports, directly or not, itself included."""
    found: set[str] = set()
    left = files_of(f"pipeline.{stage}")
    while left:
        file = left.pop()
        found.add(file)
        left |= {f for name in imported(ROOT / file) for f in files_of(name)} - found
    return found


def distributions(stage: str) -> set[str]:
    """List the packages of pyproject.toml's groups that a stage's closure imports or asks for."""
    of_module = importlib.metadata.packages_distributions()
    used: set[str] = set()
    for file in closure(stage):
        for name in imported(ROOT / file):
            used |= set(of_module.get(name.split(".")[0], []))
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value)  # importlib.metadata.distribution("elpv-dataset")
    return used


def test_dvc_yaml_has_the_stages():
    assert set(STAGES) == set(GRAPH)


def code(stage: str) -> set[str]:
    """List the files of code under a stage's deps, those of a listed folder among them."""
    places = [Path(place) for place in listed(stage, "deps") if place.startswith("pipeline/")]
    files = (f for place in places for f in ([place] if place.suffix else place.rglob("*.py")))
    return {str(file) for file in files}


@each_stage
def test_code_deps_are_what_the_stage_imports(stage):
    assert closure(stage) - PACKAGE == code(stage)


def test_no_file_is_listed_by_more_than_two_stages_but_in_a_folder():
    listings = Counter(path for stage in STAGES for path in listed(stage, "deps"))
    assert [] == [path for path, n in listings.items() if path.endswith(".py") and n > 2]


def test_the_file_of_the_package_holds_nothing_that_a_result_could_depend_on():
    [docstring] = ast.parse((ROOT / "pipeline/__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)


def of_each_stage(program: str) -> dict[str, list[str]]:
    """Run one of the programs above in a process of its own: the files it names for each stage."""
    done = subprocess.run(
        [sys.executable, "-c", program, *STAGES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files: dict[str, list[str]] = json.loads(done.stdout)
    return files


def test_code_deps_hold_every_module_that_importing_a_stage_loads():
    for stage, files in of_each_stage(IMPORT_EACH).items():
        loads = {str(Path(file).relative_to(ROOT)) for file in files}
        assert f"pipeline/{stage}.py" in loads
        assert set() == loads - code(stage) - PACKAGE


def test_a_state_belongs_to_the_code_that_its_stage_depends_on_and_the_versions():
    """So an edit of `compare` leaves a half-trained stage 2, and one of `training/fit` doesn't."""
    found = {stage: set(files) for stage, files in of_each_stage(START_EACH).items()}
    assert set(STAGES) == set(found)
    for stage, files in found.items():
        beside = {file for file in files if file.endswith(".html")}
        assert files == code(stage) | beside | {"pyproject.toml"}, stage
    assert "pipeline/commands/compare.py" not in found["stage2"]
    assert "pipeline/training/fit.py" in found["stage2"]


@pytest.mark.parametrize(
    ("stage", "unused"),
    [("prepare", "torch"), ("probe", "torch"), ("stage1", "sklearn"), ("extract", "torch._dynamo")],
)
def test_a_stage_starts_without_a_library_that_it_does_not_use(stage, unused):
    code = f"import sys, pipeline.{stage}; sys.exit({unused!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.long
def test_the_compiler_works_for_who_imports_it_later():
    compiled = "torch.compile(abs, backend='eager')(torch.tensor(-2))"
    code = f"import pipeline.extract, torch; print({compiled})"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "tensor(2)\n"


def test_the_probes_threads_find_loaded_what_they_fit_with():
    """Two threads that import a module at once may see half of it."""
    wanted = {"sklearn.linear_model", "sklearn.svm"}
    code = f"import sys, pipeline.probe; sys.exit(not {wanted} <= set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


EFFECTS = """
import importlib, os, signal, sys
from pathlib import Path
import PIL.Image, torch
def world():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return dict(os.environ), handlers, PIL.Image.MAX_IMAGE_PIXELS, torch.get_num_threads()
before = world()
for file in sorted(Path("pipeline").rglob("*.py")):
    importlib.import_module(".".join(file.with_suffix("").parts))
sys.exit(before != world())
"""


def test_an_import_changes_nothing_but_what_is_imported():
    assert subprocess.run([sys.executable, "-c", EFFECTS], cwd=ROOT, check=False).returncode == 0


def test_the_top_of_the_package_is_the_graph():
    top = {file.stem for file in (ROOT / "pipeline").glob("*.py")}
    assert {*STAGES, "__main__", "__init__"} == top


@each_stage
def test_stages_do_not_import_each_other(stage):
    assert {f"pipeline/{stage}.py"} == closure(stage) & {f"pipeline/{name}.py" for name in STAGES}


@each_stage
def test_params_are_those_of_the_signature(stage):
    """A section is listed where all of it is read: so a new or misspelt key there is noticed."""
    given = yaml.safe_load((ROOT / "params.yaml").read_text())
    params = [entry for entry in GRAPH[stage]["params"] if isinstance(entry, str)]
    sections = [entry for entry in params if isinstance(given.get(entry), dict)]
    keys = [key for section in sections for key in flat({section: given[section]})]
    alone = [entry for entry in params if entry not in sections]
    # The run cache passes over these within a section, so they are listed once more.
    twice = [key for key in alone if key in keys and key.endswith((".size", ".nfiles"))]
    assert sorted([param.key for param in stage_params(STAGES[stage])] + twice) == sorted(
        keys + alone
    )


def test_the_sections_that_params_yaml_may_have_are_those_it_has():
    assert set(TOP) == set(yaml.safe_load((ROOT / "params.yaml").read_text()))


def test_every_key_of_params_yaml_is_read_by_a_stage_and_the_other_way_round():
    read = {param.key for stage in STAGES.values() for param in stage_params(stage)}
    assert read == set(flat(yaml.safe_load((ROOT / "params.yaml").read_text())))


@each_stage
def test_a_stage_that_is_given_all_params_depends_on_all_of_them(stage):
    given = AllParams in get_type_hints(STAGES[stage], include_extras=True).values()
    assert given == ("params.yaml" in listed(stage, "params"))
    assert listed(stage, "params").get("params.yaml") is None  # no keys: all


def test_template_deps_are_what_the_report_renders():
    environment = jinja2.Environment(autoescape=True)
    found, left = set(), {"report.html"}
    while left:
        name = left.pop()
        found.add(f"pipeline/pages/{name}")
        tree = environment.parse((ROOT / "pipeline/pages" / name).read_text())
        left |= {str(name) for name in jinja2.meta.find_referenced_templates(tree)}
    assert "pipeline/pages" in listed("report", "deps")
    assert found == {
        f"pipeline/pages/{page.name}" for page in (ROOT / "pipeline/pages").glob("*.html")
    }


@each_stage
def test_version_params_are_the_groups_of_the_packages_in_use(stage):
    used = distributions(stage)
    expected = {
        f"{GROUP}{group}"
        for group, pins in GROUPS.items()
        if group != "dev" and used & {pin.partition("==")[0] for pin in pins}
    }
    assert expected == set(listed(stage, "params")["pyproject.toml"])


@each_stage
def test_command_names_the_paths_of_the_signature_and_the_files_of_dvc_yaml(stage):
    words = shlex.split(GRAPH[stage]["cmd"])
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert ["python", "-m", "pipeline", stage] == words[:4]
    named = {name: f"--{name.replace('_', '-')}" for name in path_names(STAGES[stage])}
    assert {"--timing", *named.values()} == set(options)

    writes = listed(stage, "outs", "metrics", "plots")
    hints = get_type_hints(STAGES[stage], include_extras=True)
    written = {options[named[name]] for name, hint in hints.items() if hint == Out}
    assert all(any(Path(f).is_relative_to(p) for f in writes) for p in written)
    written.add(options["--timing"])
    inputs = {f for f in listed(stage, "deps") if not f.startswith("pipeline/")}
    inputs -= {"${prepare.path}"}
    assert options["--timing"] in writes
    reads = set(options.values()) - written
    assert all(any(Path(f).is_relative_to(p) for p in reads) for f in inputs)
    assert all(any(Path(f).is_relative_to(p) for f in inputs) for p in reads)


def test_the_files_of_prepare_that_a_stage_opens_are_the_ones_it_depends_on(finished, tmp_path):
    """So that what only the audit says reruns nothing."""
    opened: list[str] = []
    recording = True

    def hook(event: str, arguments: Any) -> None:
        if recording and event == "open" and isinstance(arguments[0], (str, Path)):
            opened.append(str(arguments[0]))

    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    sys.addaudithook(hook)  # can't be taken away, only told to stop
    params = read_params(prepare={"path": str(finished / "photos")})
    for stage in (name for name in STAGES if name != "prepare"):
        opened.clear()
        run(folder, params, stage)
        inside = {Path(f) for f in opened if Path(f).is_relative_to(folder / "prepared")}
        shards = folder / "prepared/images"
        whole = {shards if file.is_relative_to(shards) else file for file in inside}
        found = {f"data/{file.relative_to(folder)}" for file in whole}
        assert found == {f for f in listed(stage, "deps") if f.startswith("data/prepared")}
        assert opened.count(str(folder / "prepared" / "index.csv")) <= 1, stage
    recording = False


@pytest.mark.parametrize(
    "sections",
    [
        {},
        *(
            pytest.param(sections, marks=pytest.mark.long)
            for sections in (
                {"prepare": {"test_fraction": 0.0}},
                {"probe": {"kinds": ["linear"]}},
                {"stage1": {"unfreeze": [], "views": 0}},
                {"stage2": {"interpolate": False}},
            )
        ),
    ],
    ids=str,
)
def test_stages_write_exactly_the_files_that_dvc_yaml_lists(sections, photos, tmp_path):
    sections = {**sections, "prepare": {"path": str(photos), **sections.get("prepare", {})}}
    run(tmp_path, read_params(**sections))
    outs = {file for stage in STAGES for file in listed(stage, "outs", "metrics", "plots")}
    expected = {f for f in outs if f.startswith("models/") and not f.endswith("timing.json")}
    written = (file for file in (tmp_path / "models").rglob("*") if file.is_file())
    assert expected == {str(file.relative_to(tmp_path)) for file in written}


@pytest.mark.long
def test_permuted_test_labels_change_nothing_before_evaluate(finished, tmp_path):
    folder = tmp_path / "permuted"
    shutil.copytree(finished / "prepared", folder / "prepared")
    index = folder / "prepared" / "index.csv"
    rows = list(csv.DictReader(index.open(newline="")))
    test = [row for row in rows if row["split"] == "test"]
    for row, label in zip(test, [row["label"] for row in reversed(test)], strict=True):
        row["label"] = label
    with index.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    assert index.read_bytes() != (finished / "prepared" / "index.csv").read_bytes()

    run(folder, read_params(), *(stage for stage in STAGES if stage != "prepare"))
    for part in ("features", *(f"models/{s}" for s in ("probe", "advice", "stage1", "stage2"))):
        expected = {f.name: f.read_bytes() for f in (finished / part).iterdir()}
        assert expected == {f.name: f.read_bytes() for f in (folder / part).iterdir()}
    before, after = (
        json.loads((paths(base)["evaluate"]["out"] / "metrics.json").read_text())["test"]["stage1"]
        for base in (finished, folder)
    )
    assert before["accuracy"] != after["accuracy"]


# What follows runs DVC in a repository of its own.


def stages_run(said: str) -> list[str]:
    return re.findall(r"^Running stage '(\w+)'", said, re.MULTILINE)


def stale(folder: Path) -> set[str]:
    """Name the stages whose own inputs differ from dvc.lock."""
    return set(json.loads(dvc(folder, "status", "--json")))


@pytest.fixture(scope="module")
def experiment(first: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """After it, `dvc exp run` with another rate for stage 2."""
    folder = shutil.copytree(first.folder, tmp_path_factory.mktemp("experiment") / "repo")
    said = dvc(folder, "exp", "run", "--name", "slower", "--set-param", f"stage2.lr={RATE:g}")
    commit(folder, "slower")
    return Run(folder, said)


def test_first_repro_runs_every_stage(first):
    assert sorted(STAGES) == sorted(stages_run(first.said))


def test_repro_leaves_git_the_lock_the_metrics_and_the_plots(first):
    uncached = [
        file
        for stage in STAGES
        for file, options in listed(stage, "outs", "metrics", "plots").items()
        if options.get("cache", True) is False
    ]
    committed = git(first.folder, "show", "--name-only", "--format=", "HEAD").splitlines()
    assert sorted(["dvc.lock", *uncached]) == sorted(committed)


def test_second_repro_runs_nothing(repo):
    said = dvc(repo, "repro")
    assert [] == stages_run(said)
    assert len(STAGES) == said.count("didn't change, skipping")
    assert set() == stale(repo)


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("probe.folds", 3, {"probe"}),
        ("probe.linear_c", [0.1], {"probe"}),
        ("stage1.lr", 1e-3, {"stage1"}),
        ("stage2.lr", RATE, {"stage2"}),
        ("evaluate.views", 1, {"advise", "evaluate"}),
        ("augment.crop", 0.9, {"advise", "stage1", "stage2"}),
        ("flips", "none", {"extract", "advise", "stage1", "stage2"}),
        ("seed", 1, set(STAGES) - {"evaluate"}),
    ],
)
def test_changed_param_makes_only_the_stages_that_read_it_stale(key, value, stages, repo):
    change(repo, key, value)
    assert stages | {"report"} == stale(repo)  # which shows all params


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("pipeline/statistics/verdict.py", {"evaluate", "report"}),
        ("pipeline/training/fit.py", {"advise", "stage1", "stage2"}),
        ("pipeline/advice/prior_results.py", {"advise"}),
        ("pipeline/dataset/decode.py", {"prepare"}),
        ("pipeline/pages/report.html", {"report"}),
        ("pipeline/commands/predict.py", set()),
    ],
)
def test_changed_code_makes_only_the_stages_that_import_it_stale(file, stages, repo):
    with (repo / file).open("a") as code:
        code.write("# changed\n")
    assert stages == stale(repo)


def test_upgraded_library_makes_the_stages_that_use_it_stale(repo):
    file = repo / "pyproject.toml"
    text = file.read_text()
    assert 1 == text.count('"timm==')
    file.write_text(text.replace('"timm==', '"timm==9.'))
    assert set(STAGES) == stale(repo)


def test_new_image_makes_prepare_stale(repo):
    shutil.copy(repo / PHOTOS / "class0" / "000.png", repo / PHOTOS / "class0" / "new.png")
    assert {"prepare"} == stale(repo)


def test_all_that_follows_the_probe_reruns_with_it(repo):
    said = dvc(repo, "repro", "--downstream", "--force", "--dry", "probe")
    assert {"probe", "advise", "stage1", "stage2", "evaluate", "report"} == set(stages_run(said))


def test_changed_rate_of_stage2_reruns_it_and_what_follows(experiment):
    assert ["stage2", "evaluate", "report"] == stages_run(experiment.said)


def test_rate_that_exp_run_writes_is_read_as_a_number(experiment):
    assert f"lr: {RATE:g}\n" in (experiment.folder / "params.yaml").read_text()
    assert RATE == loaded(experiment.folder / "params.yaml")["stage2"]["lr"]


def test_earlier_params_take_the_earlier_results_from_the_run_cache(experiment, tmp_path):
    folder = shutil.copytree(experiment.folder, tmp_path / "repo")
    git(folder, "checkout", "--quiet", "HEAD~1", "--", "params.yaml")
    said = dvc(folder, "repro")
    assert [] == stages_run(said)
    skipped = re.findall(r"^Stage '(\w+)' is cached - skipping run", said, re.MULTILINE)
    assert ["stage2", "evaluate", "report"] == skipped
    assert "" == git(folder, "diff", "HEAD~1")


def test_exp_show_lists_the_experiment_with_its_params_and_metrics(experiment):
    text = dvc(experiment.folder, "exp", "show", "--csv", "--rev", "HEAD~1")
    row = next(r for r in csv.DictReader(io.StringIO(text)) if r["Experiment"] == "slower")
    metrics = json.loads((experiment.folder / "models/stage2/metrics.json").read_text())
    assert RATE == float(row["stage2.lr"])
    assert metrics["stage2"]["val"]["loss"] == float(row["stage2.val.loss"])


def test_params_diff_shows_the_changed_key_alone(experiment):
    diff = json.loads(dvc(experiment.folder, "params", "diff", "--json", "HEAD~1"))
    assert {"params.yaml": ["stage2.lr"]} == {file: list(keys) for file, keys in diff.items()}


def test_metrics_diff_shows_what_stage2_scores_now_and_scored_before(experiment):
    file = "models/stage2/metrics.json"
    diff = json.loads(dvc(experiment.folder, "metrics", "diff", "--json", "HEAD~1"))
    old = flat(json.loads(git(experiment.folder, "show", f"HEAD~1:{file}")))
    new = flat(json.loads((experiment.folder / file).read_text()))
    changed = {key: (old[key], new[key]) for key in new if old[key] != new[key]}
    assert changed
    assert changed == {key: (v["old"], v["new"]) for key, v in diff[file].items()}


def test_metrics_show_has_the_keys_that_others_rely_on(first):
    shown = json.loads(dvc(first.folder, "metrics", "show", "--json"))[""]["data"]
    keys = {key for file in shown.values() for key in flat(file["data"])}
    of_model = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_weighted")
    of_model += ("balanced_accuracy", "f1_macro", "auroc")
    of_training = ("val.accuracy", "val.balanced_accuracy", "val.loss", "epochs", "best_epoch")
    expected = {
        *(f"test.{m}.{k}" for m in ("probe", "probe_linear", "stage1", "stage2") for k in of_model),
        *(f"{stage}.{k}" for stage in ("stage1", "stage2") for k in of_training),
        *(f"probe.val.{k}" for k in ("accuracy", "balanced_accuracy", "loss")),
        *(f"stage2_minus_probe.{k}" for k in ("accuracy", "low", "high", "p_value")),
        *(f"{stage}.seconds" for stage in STAGES),
        *(f"advice.{k}" for k in ("case", "expected_gain.gain", "expected_gain.low")),
        *(f"fine_tuning.{k}" for k in ("expected", "low", "high", "happened", "held")),
        "chosen",
    }
    assert set() == expected - keys


def plot_titles() -> list[str]:
    """Name the plots of the graph and of its stages: what a page of plots has to show."""
    own = [options["title"] for stage in STAGES for options in listed(stage, "plots").values()]
    return own + [
        title for p in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"] for title in p
    ]


def test_plots_diff_draws_every_plot_for_both_commits(experiment, tmp_path):
    dvc(experiment.folder, "plots", "diff", "HEAD~1", "--out", str(tmp_path / "plots"))
    page = (tmp_path / "plots" / "index.html").read_text()
    titles = plot_titles()
    assert len(titles) == len(set(titles)) == 9
    assert [] == [title for title in titles if title not in page]
    assert {"HEAD~1", "workspace"} == set(re.findall(r'"rev": "([^"]+)"', page))
    specs = [json.loads(found) for found in re.findall(r"var spec = (\{.*?\});\s", page, re.DOTALL)]
    drawn = [spec for spec in specs if spec["title"]["text"] in titles and "encoding" in spec]
    assert len(drawn) == len(titles) - 1  # the confusion matrix has layers
    for spec in drawn:  # words on an axis of numbers would be drawn nowhere
        x = spec["encoding"]["x"]
        values = [row[x["field"]] for row in spec["data"]["values"]]
        assert values
        assert x["type"] == "nominal" or all(float(value) >= 0 for value in values)


@pytest.mark.parametrize("width", [400, pytest.param(1400, marks=pytest.mark.long)])
def test_the_page_of_plots_is_drawn_without_a_network(width, experiment, tmp_path):
    folder = shutil.copytree(experiment.folder, tmp_path / "repo")
    command(folder, sys.executable, "-m", "pipeline", "plots", "page/plots.html")
    dvc(folder, "config", "--local", "plots.html_template", "../page/plots.html")
    dvc(folder, "plots", "diff", "HEAD~1")
    seen = look(folder / "dvc_plots" / "index.html", width)
    assert seen.drawn == len(plot_titles())
    assert [] == seen.requests
    assert [] == seen.console
    assert seen.needs <= width


def test_pulled_clone_is_up_to_date(repo, tmp_path):
    store = f"[core]\n    remote = store\n['remote \"store\"']\n    url = {tmp_path / 'store'}\n"
    (repo / ".dvc" / "config.local").write_text(store)
    dvc(repo, "push")
    clone = tmp_path / "elsewhere" / "clone"
    git(tmp_path, "clone", "--quiet", str(repo), str(clone))
    (clone / ".dvc" / "config.local").write_text(store)
    assert set() != stale(clone)
    dvc(clone, "pull")
    assert set() == stale(clone)
    assert [] == stages_run(dvc(clone, "repro"))


@pytest.mark.long
def test_forced_second_run_writes_the_same_bytes(first, repo):
    assert sorted(STAGES) == sorted(stages_run(dvc(repo, "repro", "--force")))
    assert hashes(first.folder) == hashes(repo)


@pytest.mark.long
def test_what_a_failed_stage_lost_comes_back_by_the_command_that_its_message_names(repo):
    files = listed("stage1", "outs", "metrics", "plots")
    before = {name: (repo / name).read_bytes() for name in files}
    change(repo, "stage1.lr", 1e-3)
    (repo / "models/stage1/history.csv.part").mkdir()  # where a file is to be written
    words = [sys.executable, "-m", "dvc", "repro", "stage1"]
    done = subprocess.run(
        words, cwd=repo, env=environment(repo), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    [recover] = re.findall(
        r"error: models/stage1/history.*`(.+)` restores the earlier outputs", done.stderr
    )
    for part in recover.split("; "):
        program, *rest = part.split()
        {"git": git, "dvc": dvc}[program](repo, *rest)
    assert before == {name: (repo / name).read_bytes() for name in files}
    assert {"stage1", "report"} == stale(repo)  # by its rate alone


def test_no_run_with_another_size_is_taken_from_the_run_cache(repo):
    """DVC's run cache leaves out every key called size or nfiles, where params are a section."""
    change(repo, "prepare.size", 48)
    dvc(repo, "repro", "prepare")
    assert json.loads((repo / "data/prepared/facts.json").read_text())["size"] == 48


def test_no_param_has_a_name_that_the_run_cache_leaves_out():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in stages.values():
        listed = [param for param in stage["params"] if isinstance(param, str)]
        sections = [param for param in listed if isinstance(params.get(param), dict)]
        hidden = {f"{s}.{key}" for s in sections for key in params[s] if key in ("size", "nfiles")}
        assert hidden <= set(listed)
