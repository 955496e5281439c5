"""New images: from files, folders and standard input, to a table, JSON, CSV and a page."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, paths

from pipeline.commands.predict import Answer, as_csv, as_table, listed, page, predict
from pipeline.final_model import classifier
from pipeline.final_model.operating_point import Decision
from pipeline.images.shards import read_images, read_rows
from pipeline.stage_runtime.errors import DataError


@pytest.fixture
def model(finished: Path) -> Path:
    return paths(finished)["evaluate"]["final"] / "model.safetensors"


def command(*words: object, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "predict", *map(str, words)],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        check=False,
        env={**os.environ, "COLUMNS": "40"},
    )


def test_files_get_the_probabilities_of_their_packed_pixels(finished, model):
    rows = read_rows(paths(finished)["prepare"]["out"], "test")
    files = [finished / "photos" / path for path in rows.paths]
    final = classifier.load(model)
    expected = final.probabilities(read_images(paths(finished)["prepare"]["out"], "test"))
    found = list(predict(final, files, top=2))
    order = np.argsort(-expected, axis=1)
    assert [a.labels for a in found] == [[f"class{i}" for i in row] for row in order]
    sorted_p = np.take_along_axis(expected, order, axis=1)
    assert np.allclose([a.probabilities for a in found], sorted_p, atol=1e-4)
    assert final.decision == Decision([None, None])  # so few validation images promise nothing
    assert [a.sure for a in found] == [None] * len(files)
    sure = predict(replace(final, decision=Decision([0.9, 0.9])), files)
    assert [a.sure for a in sure] == list(expected.max(1) >= 0.9)


@pytest.mark.parametrize("content", [b"no picture", b""])
def test_a_file_that_is_no_image_is_named_and_the_others_are_classified(
    content, photos, finished, model
):
    (photos / "class0" / "005.png").write_bytes(content)
    files = sorted((photos / "class0").iterdir())
    answers = list(predict(classifier.load(model), files))
    assert [a.file for a in answers] == [str(f) for f in files]
    assert [a.file for a in answers if a.error] == [str(photos / "class0" / "005.png")]
    assert "can't be read as an image" in answers[5].error
    without = list(predict(classifier.load(model), files[:5] + files[6:]))
    kept = [a for a in answers if not a.error]
    assert [(a.labels, a.probabilities) for a in without] == [
        (a.labels, a.probabilities) for a in kept
    ]


@pytest.mark.long
def test_folders_are_searched_and_standard_input_may_be_paths(photos, model):
    in_folder = command(photos, "--model", model, "--json")
    files = sorted(photos.rglob("*.png"))
    by_path = command("-", "--model", model, "--json", stdin="\n".join(map(str, files)).encode())
    assert in_folder.returncode == by_path.returncode == 0
    assert [row["file"] for row in json.loads(in_folder.stdout)] == [str(f) for f in files]
    assert in_folder.stdout == by_path.stdout


@pytest.mark.long
def test_standard_input_may_be_an_image(photos, model):
    file = photos / "class1" / "000.png"
    [piped] = json.loads(command("-", "--model", model, "--json", stdin=file.read_bytes()).stdout)
    [named] = json.loads(command(file, "--model", model, "--json").stdout)
    assert {**piped, "file": ""} == {**named, "file": ""}
    assert piped["file"].endswith("standard input")


def test_the_exit_code_tells_whether_every_image_was_classified(photos, model):
    (photos / "class0" / "bad.png").write_text("no picture")
    done = command(photos / "class0", "--model", model, "--csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode())))
    assert len(rows) == 17
    assert [r["file"] for r in rows if r["error"]] == [str(photos / "class0" / "bad.png")]
    assert done.returncode == 1
    assert done.stderr.decode().count("\n") == 1
    assert command(photos / "class1", "--model", model).returncode == 0
    assert command(photos, "--top", "0").returncode == 2


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_names_no_image_is_refused(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no such file|no files below it"):
        listed([str(tmp_path / name)], tmp_path)


ANSWERS = [
    Answer("a" * 90, ["ant", "bee"], [0.5, 0.4], sure=False),
    Answer("=1+1.png", ["bee", "ant"], [0.98765, 0.01], sure=True),
    Answer("c.png", error="c.png: can't be read"),
]


def test_the_table_keeps_long_paths_whole_and_says_what_is_not_sure():
    out = io.StringIO()
    as_table(ANSWERS, out)
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["file", "label", "probability"],
        ["a" * 90, "ant", "(not", "sure)", "0.500"],
        ["bee", "0.400"],
        ["=1+1.png", "bee", "0.988"],
        ["ant", "0.010"],
        ["c.png", "-", "can't", "be", "read"],
    ]


def test_csv_holds_no_formula_and_a_column_a_label():
    out = io.StringIO()
    as_csv(ANSWERS, out)
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert list(rows[0]) == [
        *("file", "label", "probability", "sure", "label_2", "probability_2", "error"),
    ]
    assert [row["file"] for row in rows] == ["a" * 90, "./=1+1.png", "c.png"]


@pytest.mark.parametrize("begin", ["=1+", "+1+", "-1+", "@", "\t=1+", "\r=1+"])
def test_no_cell_of_the_csv_begins_as_a_formula_does(begin):
    odd = f"{begin}1.png"
    answers = [
        Answer(odd, error=f"{odd}: can't be read as an image"),
        Answer("a.png", [odd, f"{begin}2"], [0.9, 0.1]),
        Answer("b.png", ["-1", "+1e3"], [0.9, 0.1]),
    ]
    out = io.StringIO(newline="")
    as_csv(answers, out)
    _, *rows = csv.reader(io.StringIO(out.getvalue(), newline=""))
    cells = [cell for row in rows for cell in row]
    numbers = {"-1", "+1e3"}
    assert [c for c in cells if c.startswith(tuple("=+-@\t\r")) and c not in numbers] == []
    assert {f"./{odd}", f"'{odd}", f"'{odd}: can't be read as an image", *numbers} <= set(cells)


class Seen(HTMLParser):
    """What a page holds."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in ("img", "br", "meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_the_pictures_and_runs_no_name(photos, tmp_path, model):
    shutil.copy(photos / "class0" / "000.png", tmp_path / "<script>.png")
    odd, file = tmp_path / "<script>.png", tmp_path / "p.html"
    done = command(odd, photos, "--model", model, "--page", file)
    assert done.returncode == 0
    text = file.read_text()
    seen = Seen()
    seen.feed(text)
    assert seen.open == []
    assert len(seen.images) == 33
    assert all(str(i["src"]).startswith("data:image/jpeg;base64,") for i in seen.images)
    assert all(i["alt"] for i in seen.images)
    assert "<script>" not in text
    assert "http" not in text


def test_a_page_of_what_cannot_be_read_says_so():
    assert "3 images, 1 not sure, 1 not readable" in page(ANSWERS)


def test_where_no_confidence_is_promised_none_is_said_to_be_unsure():
    answers = [Answer(f"{i}.png", ["ants"], [0.3], sure) for i, sure in enumerate((None, False))]
    table = io.StringIO()
    as_table(answers, table)
    assert [line.split()[1:] for line in table.getvalue().splitlines()[1:]] == [
        ["ants", "0.300"],
        ["ants", "(not", "sure)", "0.300"],
    ]
    lines = io.StringIO()
    as_csv(answers, lines)
    assert [row["sure"] for row in csv.DictReader(io.StringIO(lines.getvalue()))] == ["", "False"]
    assert [answer.row()["sure"] for answer in answers] == [None, False]
    assert page(answers).count("(not sure)") == 1
    assert "2 images, 1 not sure" in page(answers)
