"""Tables as programs write them: other separators, encodings, cases, columns, Unicode forms."""

import unicodedata

import pytest

from pipeline.dataset.table import items_of
from pipeline.stage_runtime.errors import DataError, ParamError

ROWS = [["path", "label", "split"], ["a.png", "cat", "train"], ["b.png", "dog", "test"]]


def written(folder, rows, separator=",", encoding="utf-8", name="set.csv"):
    for row in rows[1:]:
        (folder / row[0]).touch()
    text = "".join(separator.join(row) + "\r\n" for row in rows)
    (folder / name).write_bytes(text.encode(encoding))
    return folder


def pairs(folder):
    items, said = items_of(folder)
    return [(item.path, item.label, item.split) for item in items], said


MEANT = [("a.png", "cat", "train"), ("b.png", "dog", "test")]


@pytest.mark.parametrize(
    ("separator", "encoding", "name", "said"),
    [
        (",", "utf-8", "set.csv", None),
        (";", "utf-8", "set.CSV", "columns parted by semicolon, encoding utf-8"),
        ("\t", "utf-8-sig", "set.tsv", "columns parted by tab, encoding utf-8"),
        ("|", "utf-16", "set.csv", "columns parted by bar, encoding utf-16"),
        (",", "utf-16-le", "set.csv", None),
    ],
)
def test_separators_and_encodings_are_found_and_said(tmp_path, separator, encoding, name, said):
    written(tmp_path, ROWS, separator, encoding, name)
    if encoding == "utf-16-le":  # without its mark it is no text
        with pytest.raises(DataError, match="not a text in UTF-8 or Windows-1252; save it as UTF"):
            items_of(tmp_path)
        return
    found, lines = pairs(tmp_path)
    assert found == MEANT
    assert lines[0].endswith("columns used: path, label, split")
    assert [line.partition(": ")[2] for line in lines[1:]] == ([said] if said else [])


def test_windows_1252_is_read_and_said(tmp_path):
    written(tmp_path, [["path", "label"], ["a.png", "Rüde"], ["b.png", "Hündin"]], ";", "cp1252")
    found, lines = pairs(tmp_path)
    assert [label for _, label, _ in found] == ["Rüde", "Hündin"]
    assert "encoding Windows-1252, as it isn't UTF-8" in lines[1]


@pytest.mark.parametrize("names", [("Path", "LABEL", "Split"), (" path", "label ", "split\u00a0")])
def test_columns_count_in_any_case(tmp_path, names):
    written(tmp_path, [list(names), *ROWS[1:]])
    found, lines = pairs(tmp_path)
    assert found == MEANT
    assert f"path ({names[0]!r})" in lines[0]


def test_unused_columns_are_named_and_those_that_look_meant(tmp_path):
    header = ["path", "label", "patient_id", "Set", "", "age"]
    written(tmp_path, [header, ["a.png", "cat", "p1", "train", "0", "3"]])
    _, lines = pairs(tmp_path)
    assert lines == [
        "set.csv: columns used: path, label; not used: patient_id, Set, column 5, age; Set looks "
        "like split: rename it if it is; patient_id looks like group: rename it if it is"
    ]


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["File Name", "label"], "no column 'path'; .*: \"path=File Name, label=label\" .it has"),
        (["path", "Class Name"], "no column 'label'; .*: \"path=path, label=Class Name\" .it has"),
        (
            ["pth", "finding"],
            "no column 'path'; .*: \"path=pth, label=[.]{3}\" .it has pth, finding.",
        ),
        (["path", "label", "Label"], "2 columns 'label'; keep one"),
    ],
)
def test_a_missing_or_doubled_column_is_named(tmp_path, names, line):
    written(tmp_path, [names, ["a.png", "cat", "x"][: len(names)]])
    with pytest.raises(DataError, match=line):
        items_of(tmp_path)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (["a.png", "cat", "train", "dog"], r"set.csv:2: 4 cells, the header has 3; quote cells"),
        (["a.png", "cat"], r"set.csv:2: 2 cells, the header has 3"),
    ],
)
def test_a_longer_or_shorter_row_is_refused(tmp_path, row, line):
    """The fault that was: the rest of a multi-label row was lost."""
    written(tmp_path, [ROWS[0], row])
    with pytest.raises(DataError, match=line):
        items_of(tmp_path)


def test_a_quoted_cell_may_hold_the_separator_and_lines_may_be_blank(tmp_path):
    written(tmp_path, [["path", "label"], ["a.png", '"cat, grey"'], ["b.png", "dog"]])
    with (tmp_path / "set.csv").open("a") as table:
        table.write("\r\n,\r\n")
    assert [label for _, label, _ in pairs(tmp_path)[0]] == ["cat, grey", "dog"]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_path_in_another_unicode_form_finds_its_file(tmp_path, forms):
    on_disk, in_table = (unicodedata.normalize(form, "größe/käse.png") for form in forms)
    (tmp_path / on_disk).parent.mkdir()
    (tmp_path / on_disk).touch()
    (tmp_path / "set.csv").write_text(f"path,label\n{in_table},x\n", encoding="utf-8")
    assert pairs(tmp_path)[0] == [(on_disk, "x", "")]


def test_words_for_splits_count_as_for_folders_and_gaps_are_counted(tmp_path):
    rows = [["path", "label", "split", "weight"], ["a.png", "cat", "Training", "0,5"],
            ["b.png", "dog", "Hold-out", ""], ["c.png", "dog", "", "2"]]  # fmt: skip
    written(tmp_path, rows, ";")
    items, lines = items_of(tmp_path)
    assert [item.split for item in items] == ["train", "test", ""]
    assert [item.weight for item in items] == [0.5, 1, 2]
    assert lines[2:] == [
        "set.csv: 1 of 3 lines have no split",
        "set.csv: 1 of 3 lines have no weight",
    ]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("ISIC_1", "part_1/ISIC_1.jpg"),
        ("ISIC_1.jpg", "part_1/ISIC_1.jpg"),
        ("part_1/ISIC_1", "part_1/ISIC_1.jpg"),
        ("käse", "part_1/ka\u0308se.JPG"),
        ("b.c", "part_1/b.c.png"),
    ],
)
def test_a_name_without_folder_or_suffix_finds_its_image_and_that_is_said(tmp_path, given, found):
    for name in ("part_1/ISIC_1.jpg", "part_1/ka\u0308se.JPG", "part_1/b.c.png", "ISIC_1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "set.csv").write_text(f"path,label\n{given},x\n", encoding="utf-8")
    listed, lines = pairs(tmp_path)
    assert listed == [(found, "x", "")]
    name = f"1 images found below the folder by their names alone ({given} is {found}, ...)"
    assert lines[1] == f"set.csv: {name}"


HAM = [
    ["lesion_id", "image_id", "dx", "group"],
    ["L1", "a.png", "nv", "x"],
    ["L2", "b.png", "mel", "y"],
]


def ham(folder):
    """A table by its columns' own names."""
    for row in HAM[1:]:
        (folder / row[1]).touch()
    (folder / "set.csv").write_text("".join(";".join(row) + "\n" for row in HAM))
    return folder


def test_columns_may_be_named_and_others_arent_used_then(tmp_path):
    items, lines = items_of(ham(tmp_path), "", "path = Image ID,label=dx")
    assert [(i.path, i.label, i.group) for i in items] == [
        ("a.png", "nv", ""),
        ("b.png", "mel", ""),
    ]
    assert "used: path ('image_id'), label ('dx'); not used: lesion_id, group" in lines[0]
    items, _ = items_of(tmp_path, "", "path=image_id, label=dx, group=lesion_id")
    assert [item.group for item in items] == ["L1", "L2"]


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ("path=img, label=dx", "no column 'img' in .*set.csv; "),
        ("group=lesion_id", "no column 'path' in"),
        ("image_id", "expected auto, or the names of path, label, split, group, weight, such as"),
        ("path=", "expected auto"),
        ("name=image_id", "expected auto"),
        ("path=image_id, path=dx", "expected auto"),
    ],
)
def test_columns_that_cant_be_are_refused(tmp_path, columns, line):
    with pytest.raises(ParamError, match=rf"params.yaml: prepare.columns.*{line}"):
        items_of(ham(tmp_path), "", columns)


def test_the_column_that_names_files_is_found_whatever_it_is_called(tmp_path):
    with pytest.raises(DataError, match=r'no column .path.; .*: "path=image_id, label=dx" .it has'):
        items_of(ham(tmp_path))


def test_one_table_of_several_is_named(tmp_path):
    ham(tmp_path)
    (tmp_path / "below").mkdir()
    written(tmp_path, ROWS, name="train.csv").joinpath("train.csv").rename(
        tmp_path / "below/of.txt"
    )
    written(tmp_path, ROWS, name="test.csv")
    for name in ("test.csv", "below/of.txt"):
        assert [item.label for item in items_of(tmp_path, name)[0]] == ["cat", "dog"]
    for name in ("none.csv", "../set.csv", str(tmp_path / "set.csv")):
        with pytest.raises(ParamError, match=r"prepare.table: no file .*; there are set.csv, test"):
            items_of(tmp_path, name)


@pytest.mark.parametrize("name", ["train.csv", "x.tsv"])
def test_more_than_one_table_is_refused_by_name(tmp_path, name):
    written(tmp_path, ROWS)
    written(tmp_path, ROWS, name=name)
    with pytest.raises(DataError, match=rf"2 CSV files here \(set.csv, {name}\); set prep"):
        items_of(tmp_path)
