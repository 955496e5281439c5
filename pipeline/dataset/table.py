"""A CSV file that names images, with any common separator, encoding and column names."""

import csv
import io
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from pipeline.dataset.fetch import is_within
from pipeline.dataset.formats import SUFFIXES, suffix
from pipeline.dataset.layout import AUTO, Item, split_of
from pipeline.images.shards import SPLITS
from pipeline.stage_runtime.errors import DataError, ParamError, one_line, suggest
from pipeline.stage_runtime.files import files_below

TABLES = (".csv", ".tsv", ".tab")
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
# The columns, and other common names for them.
COLUMNS = {
    "path": ("file", "filename", "filepath", "image", "imagepath", "imagefile", "img", "imagename"),
    "label": (
        "class",
        "classname",
        "labels",
        "category",
        "target",
        "species",
        "diagnosis",
        "dx",
        "y",
    ),
    "split": ("set", "subset", "partition", "phase", "usage"),
    "group": ("groupid", "groups", "patient", "patientid", "subject", "subjectid", "caseid"),
    "weight": ("sampleweight", "weights", "confidence"),
}
NEEDED = ("path", "label")
BOMS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}


def is_table(name: str) -> bool:
    """Return whether a file has the suffix of a table."""
    return name.lower().endswith(TABLES)


def items_of(folder: Path, table: str = "", called: str = AUTO) -> tuple[list[Item], list[str]]:
    """List the images that a table in a folder names, and describe which parts of it were used.

    `table` is the file if there are several; `called` is the param: auto, or the names of the
    columns, such as path=image_id, label=dx.

    The columns, in upper or lower case, are path (relative to the folder; or only the file's name,
    with or without suffix, if it is unique below the folder), label, and optionally split (train,
    val, test, or empty: drawn from train), group (must stay in one split) and weight (above 0). The
    separator is a comma, semicolon, tab or bar. The encoding is UTF-8, UTF-16 with a byte order
    mark, or else Windows-1252.

    Raises DataError naming the line that can't be used, ParamError for a missing table or column.
    """
    file, given = _table(folder, table), _given(called)
    text, encoding = _text(file)
    separator = _separator(text, {_plain(name) for name in given.values()} or set(COLUMNS))
    try:
        rows = list(_rows(text, separator))
    except csv.Error as error:
        raise DataError(
            f"{file}: can't be read as CSV ({one_line(error)}); export it again"
        ) from None
    if not rows:
        raise DataError(f"{file}: is empty; expected the columns path and label")
    (_, header), *lines = rows
    paths = _Paths(folder)
    columns = _columns(file, paths, header, given, lines[0][1] if lines else [])
    items = [_item(paths, f"{file}:{n}", header, cells, columns, separator) for n, cells in lines]
    if not items:
        raise DataError(f"{file}: lists no images")
    twice = [name for name, times in Counter(item.path for item in items).items() if times > 1]
    if twice:
        raise DataError(f"{file}: lists {twice[0]} more than once; keep one line of it")
    said = [_said(file, header, columns)]
    if separator != "," or encoding != "utf-8":
        names = {"utf-8-sig": "utf-8", "cp1252": "Windows-1252, as it isn't UTF-8"}
        of = names.get(encoding, encoding)
        said.append(f"{file.name}: columns parted by {SEPARATORS[separator]}, encoding {of}")
    if paths.by_name:
        name, found = next(iter(paths.by_name.items()))
        said.append(
            f"{file.name}: {len(paths.by_name)} images found below the folder by their names alone "
            f"({name} is {found}, ...)"
        )
    for column in ("split", "group", "weight"):
        if column in columns:
            n = sum(not cells[columns[column]].strip() for _, cells in lines)
            if n:
                said.append(f"{file.name}: {n} of {len(items)} lines have no {column}")
    return items, said


def _table(folder: Path, named: str) -> Path:
    """Find the table in a folder."""
    tables = sorted(f for f in folder.iterdir() if is_table(f.name) and f.is_file())
    shown = ", ".join(f.name for f in tables[:4])
    if named:
        if not is_within(PurePosixPath(named)) or not (folder / named).is_file():
            has = f"; there are {shown}" if tables else ""
            raise ParamError(f"params.yaml: prepare.table: no file {named} in {folder}{has}")
        return folder / named
    if not tables:
        raise DataError(
            f"{folder}: no CSV file here; put it there, or set prepare.table to its path"
        )
    if len(tables) > 1:
        raise DataError(
            f"{folder}: {len(tables)} CSV files here ({shown}); set prepare.table to the one that "
            "names images and labels"
        )
    return tables[0]


def _given(called: str) -> dict[str, str]:
    """Parse the param: columns to their names in the table; empty for auto.

    Raises ParamError for any other text.
    """
    if called == AUTO:
        return {}
    found = {}
    for part in called.split(","):
        name, equals, theirs = (text.strip() for text in part.partition("="))
        if name not in COLUMNS or not equals or not theirs or name in found:
            raise ParamError(
                f"params.yaml: prepare.columns = {called!r}: expected auto, or the names of "
                f"{', '.join(COLUMNS)}, such as path=image_id, label=dx"
            )
        found[name] = theirs
    return {**{name: name for name in NEEDED}, **found}


def _text(file: Path) -> tuple[str, str]:
    content = file.read_bytes()
    marked = [name for mark, name in BOMS.items() if content.startswith(mark)]
    for encoding in (*marked, "utf-8", "cp1252"):
        try:
            text = content.decode(encoding)
        except UnicodeError:
            continue
        if "\0" not in text:
            return text, encoding
    raise DataError(f"{file}: not a text in UTF-8 or Windows-1252; save it as UTF-8")


def _separator(text: str, wanted: set[str]) -> str:
    """Return the separator whose header has the wanted columns, else the most frequent one."""

    def fitness(separator: str) -> tuple[int, int]:
        try:
            header = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), [])
        except csv.Error:
            header = []
        named = {_plain(name) for name in header}
        return len(named & wanted), len(header)

    return max(SEPARATORS, key=fitness)


def _rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that aren't blank, with the number of the line where each ends."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    for cells in reader:
        if any(cell.strip() for cell in cells):
            yield reader.line_num, cells


def _plain(name: str) -> str:
    text = unicodedata.normalize("NFKC", name).casefold()
    return "".join(char for char in text if char.isalnum())


def _columns(
    file: Path,
    paths: "_Paths",
    header: Sequence[str],
    given: dict[str, str],
    first: Sequence[str],
) -> dict[str, int]:
    """Find the columns by name; `first` are the cells of the first line.

    Raises DataError if a required column is missing or a column occurs twice, ParamError if one
    that the param names is missing.
    """
    names = [_plain(name) for name in header]
    wanted = {name: _plain(theirs) for name, theirs in (given or {n: n for n in COLUMNS}).items()}
    for name, theirs in wanted.items():
        if names.count(theirs) > 1:
            raise DataError(f"{file}: {names.count(theirs)} columns {theirs!r}; keep one")
        if given and theirs not in names:
            raise ParamError(
                f"params.yaml: prepare.columns: no column {given[name]!r} in {file}; "
                f"{suggest(given[name], [h for h in header if h.strip()])}"
            )
    found = {name: names.index(theirs) for name, theirs in wanted.items() if theirs in names}
    if missing := [name for name in NEEDED if name not in found]:
        raise DataError(f"{file}: {_what_to_do(missing[0], paths, header, first)}")
    return found


def _what_to_do(missing: str, paths: "_Paths", header: Sequence[str], first: Sequence[str]) -> str:
    """Return what to do if a required column is missing, from the columns that the table has."""
    cell = header[0].strip().replace("\\", "/") if header else ""
    if cell and (paths.folder / cell).is_file():
        return "no header: its first line names a file; put path,label above it"
    shown = [h.strip() for h in header if h.strip()]
    meant = {
        name: next((h for h in shown if _plain(h) in (name, *COLUMNS[name])), "...")
        for name in NEEDED
    }
    if "path" not in [_plain(h) for h in shown]:  # the column that names files
        files = [h.strip() for h, c in zip(header, first, strict=False) if paths.named(c)]
        meant["path"] = next(iter(files), meant["path"])
    has = ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "")
    return (
        f'no column {missing!r}; set prepare.columns: "path={meant["path"]}, '
        f'label={meant["label"]}" (it has {has})'
    )


def _said(file: Path, header: Sequence[str], columns: dict[str, int]) -> str:
    """Describe which columns are used, which aren't, and which of those look misnamed."""
    used = [name if header[i] == name else f"{name} ({header[i]!r})" for name, i in columns.items()]
    others = [
        h.strip() or f"column {i + 1}" for i, h in enumerate(header) if i not in columns.values()
    ]
    line = f"{file.name}: columns used: {', '.join(used)}"
    if others:
        line += f"; not used: {', '.join(others)}"
    looks = [
        f"{h} looks like {name}: rename it if it is"
        for name, called in COLUMNS.items()
        if name not in columns
        for h in others
        if _plain(h) in called
    ]
    return "; ".join([line, *looks])


def _item(
    paths: "_Paths",
    where: str,
    header: Sequence[str],
    cells: Sequence[str],
    columns: dict[str, int],
    separator: str,
) -> Item:
    """Return the item of one line; `where` names the line in errors."""
    if len(cells) != len(header):
        raise DataError(
            f"{where}: {len(cells)} cells, the header has {len(header)}; quote cells that "
            f"contain a {SEPARATORS[separator]}, and give one label per image"
        )
    row = {name: cells[i].strip() for name, i in columns.items()}
    name = paths.find(row["path"], where)
    if not row["label"]:
        raise DataError(f"{where}: {name} has no label")
    said = row.get("split", "")
    split = split_of(said)
    if said and not split:
        raise DataError(f"{where}: split {said!r}; {suggest(said.lower(), SPLITS)}")
    given = row.get("weight") or "1"
    try:
        weight = float(given if separator == "," else given.replace(",", "."))
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise DataError(f"{where}: weight {given!r} is not a number above 0")
    return Item(name, row["label"], split, row.get("group", ""), weight)


class _Paths:
    """The files below a folder, found by their names in a table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_name: dict[str, str] = {}  # for those whose full path isn't given

    def named(self, given: str) -> str:
        """Return the file that a cell names, like `find`; empty if it names none."""
        try:
            return self.find(given.strip(), "")
        except DataError:
            return ""

    def find(self, given: str, where: str) -> str:
        """Return a file's path as it is on disk, relative to the folder.

        Raises DataError if there is none, if it is outside the folder, or if several match.
        """
        name = PurePosixPath(given.replace("\\", "/"))
        if not name.parts or not is_within(name):
            raise DataError(
                f"{where}: path {given!r} isn't relative to {self.folder} and within it"
            )
        if (self.folder / name).is_file():
            return name.as_posix()
        # The same letters in another Unicode form: macOS decomposes accents, others don't.
        called = _composed(name.as_posix())
        alike = self._by_form.get(called) or self._by_name.get(called) or []
        if len(alike) == 1:
            if called not in self._by_form:
                self.by_name[given] = alike[0]
            return alike[0]
        if alike:
            raise DataError(
                f"{where}: {given!r} matches {len(alike)} files ({', '.join(alike[:2])}); "
                "give its folder and suffix, or rename all but one"
            )
        folded = called.casefold()
        others = self._by_case.get(folded) or self._by_stem.get(PurePosixPath(folded).stem)
        hint = f"; did you mean {others[0]}?" if others else ""
        raise DataError(f"{where}: no file {self.folder / name}{hint}")

    @cached_property
    def _names(self) -> list[str]:
        return [f.as_posix() for f in files_below(self.folder)]

    @cached_property
    def _by_form(self) -> dict[str, list[str]]:
        return _grouped((_composed(name), name) for name in self._names)

    @cached_property
    def _by_case(self) -> dict[str, list[str]]:
        return _grouped((_composed(name).casefold(), name) for name in self._names)

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """Map the ends of paths to files: without suffix, without folder, without both."""
        images = [(PurePosixPath(name), name) for name in self._names if suffix(name) in SUFFIXES]
        ends = ({str(p.with_suffix("")), p.name, p.stem} - {name} for p, name in images)
        return _grouped(
            (_composed(end), name)
            for (_, name), these in zip(images, ends, strict=True)
            for end in these
        )

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        return _grouped((PurePosixPath(_composed(n).casefold()).stem, n) for n in self._names)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _grouped(pairs: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, name in pairs:
        found.setdefault(key, []).append(name)
    return found
