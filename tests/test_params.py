"""What is said of params: it is what the signatures check and params.yaml says."""

from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Interval
from conftest import ROOT, STAGES
from pydantic import TypeAdapter, ValidationError
from repository import tool

from pipeline.commands.params import FILE, allowed, check, comments, described, markdown
from pipeline.stage_runtime.errors import ParamError
from pipeline.stage_runtime.schema import STRICT, stage_params

PARAMS = described(ROOT / FILE)


def test_the_docs_have_all_params_as_they_are():
    assert (ROOT / "docs/params.md").read_text() == markdown(PARAMS) + "\n"


def test_every_param_is_explained_and_read():
    assert [] == [one.key for one in PARAMS if not one.about]
    assert all(one.stages for one in PARAMS)
    assert {p.key for s in STAGES.values() for p in stage_params(s)} == {p.key for p in PARAMS}


@pytest.mark.parametrize(
    ("hint", "said", "inside", "outside"),
    [
        (Annotated[int, Interval(ge=2, le=20)], "whole number from 2 to 20", [2, 20], [1, 21, 2.0]),
        (Annotated[float, Interval(gt=0, lt=1)], "number above 0 below 1", [0.5], [0.0, 1.0, "1"]),
        (Annotated[float, Gt(0)], "number above 0", [1e-9], [0.0]),
        (Annotated[int, Ge(1)], "whole number from 1", [1], [0]),
        (list[Literal["a", "b"]], "list of: a, b", [[], ["a"]], [["c"], "a"]),
        (Literal["auto"] | list[str], "auto or list of: text", ["auto", ["x"]], ["x", [1]]),
        (bool, "true or false", [True], ["true", 1]),
    ],
    ids=str,
)
def test_what_is_said_to_be_allowed_is_what_the_check_lets_pass(hint, said, inside, outside):
    assert allowed(hint) == said
    check = TypeAdapter(hint, config=STRICT)
    for value in inside:
        check.validate_python(value)
    for value in outside:
        with pytest.raises(ValidationError):
            check.validate_python(value)


def test_comments_belong_to_the_key_before_them():
    text = """# Of the file.

seed: 0
flips: none   # one
              # and two
part:         # of a section
  size: 224   # three
  # four
  name: "#5"

# Of nothing.
"""
    assert comments(text) == {
        "flips": "one and two",
        "part": "of a section",
        "part.size": "three four",
    }


def test_a_misspelt_param_is_told_the_near_ones():
    done = tool(ROOT, "params", "stage2.lrr")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no param is called 'stage2.lrr'; did you mean stage2.lr")
    assert done.stderr.count("\n") == 1


def test_a_section_is_listed_with_its_values():
    lines = tool(ROOT, "params", "prepare").stdout.splitlines()
    assert lines[0] == "prepare.source: elpv"
    assert "prepare.size: 224" in lines
    assert not any(line.startswith("stage1") for line in lines)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("  path: data/raw", "  path: 2024", "prepare.path = 2024"),
        ("  path: data/raw", "  path: ~", "prepare.path = None"),
        ("  path: data/raw", '  path: "~/mine"', "write it in full, /"),
        ("  lr: 5.0e-5", "  lr: quick", "stage2.lr = 'quick'"),
        ("seed: 0", "sed: 0", "seed is missing"),
    ],
)
def test_a_wrong_value_is_named_before_dvc_meets_it(tmp_path, old, new, line):
    text = (ROOT / FILE).read_text()
    assert old in text
    (tmp_path / "params.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(ParamError, match=line):
        check(tmp_path / "params.yaml")


def test_the_committed_params_are_right():
    check(ROOT / FILE)
