"""Params: what each key of params.yaml does, its allowed values, and the stages that read it.

python -m pipeline params                    # all of them
python -m pipeline params stage2.lr flips    # these
python -m pipeline params --check            # can a run begin: is every value allowed?
python -m pipeline params --markdown         # docs/params.md
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Le, Lt

from pipeline.commands.repository import refuse_unreadable_lock
from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.stage_runtime.errors import ParamError, suggest
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import STAGES, arguments, flat, read_params, stage_params

FILE = Path("params.yaml")
PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Described:
    """The description of a param."""

    key: str
    value: Any  # in params.yaml
    allowed: str
    about: str  # its comment in params.yaml
    stages: list[str]  # that read it

    def written(self) -> str:
        """Return its value as written in YAML."""
        if isinstance(self.value, bool):
            return str(self.value).lower()
        if isinstance(self.value, list):
            return f"[{', '.join(map(str, self.value))}]"
        return '""' if self.value == "" else str(self.value)


def described(file: Path) -> list[Described]:
    """Describe all params in the order of the file, from the signatures that read them."""
    hints: dict[str, Any] = {}
    readers: dict[str, list[str]] = {}
    for name in STAGES:
        for param in stage_params(getattr(import_module(f"pipeline.{name}"), name)):
            # The stage that a section belongs to has the strictest limits.
            if not param.foreign or param.key not in hints:
                hints[param.key] = param.hint
            readers.setdefault(param.key, []).append(name)
    about = comments(file.read_text(encoding="utf-8"))
    return [
        Described(key, value, allowed(hints[key]), _said(key, about), readers[key])
        for key, value in flat(read_params(file))
        if key in hints
    ]


def check(file: Path) -> None:
    """Check params and dvc.lock before DVC reads what is invalid.

    Raises ParamError naming the first param that its stages don't allow, and RepositoryError if DVC
    can't read dvc.lock.
    """
    refuse_unreadable_lock(file.parent)
    params = read_params(file)
    for name in STAGES:
        arguments(getattr(import_module(f"pipeline.{name}"), name), params)
    path = params["prepare"]["path"]
    if path.startswith("~"):
        raise ParamError(
            f"params.yaml: prepare.path = {path!r}: write it in full, {Path(path).expanduser()}"
        )


def _said(key: str, about: dict[str, str]) -> str:
    """Return a key's comment; keys of stage 2 are explained at stage 1."""
    return about.get(key) or about.get(key.replace("stage2.", "stage1."), "")


def comments(text: str) -> dict[str, str]:
    """Return the comments on the keys of a params.yaml: on the same line, and on lines below."""
    found: dict[str, str] = {}
    section = key = ""
    for line in text.splitlines():
        if entry := re.match(r"""( *)([\w.]+):((?:"[^"]*"|'[^']*'|[^#"'])*)(?:# *(.*))?$""", line):
            indent, name, value, said = entry.groups()
            if not indent and not value.strip():
                section = name
            key = f"{section}.{name}" if indent else name
            found[key] = said or ""
        elif more := re.match(r" +# *(.*)$", line):
            found[key] = f"{found.get(key, '')} {more[1]}".strip()
        else:
            key = ""
    return {name: said for name, said in found.items() if said}


def allowed(hint: Any) -> str:
    """Describe the values that a type with its limits allows."""
    if get_origin(hint) is Annotated:
        kind, *marks = get_args(hint)
        limits = [limit for mark in marks for limit in _limits(mark)]
        return " ".join([allowed(kind), " ".join(limits)]).strip()
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"list of: {allowed(get_args(hint)[0])}"
    if get_args(hint):  # one of several types
        return " or ".join(allowed(kind) for kind in get_args(hint) if kind is not NoneType)
    return PLAIN.get(hint, getattr(hint, "__name__", str(hint)))


def _limits(mark: Any) -> Iterator[str]:
    words = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
    if isinstance(mark, (Ge, Gt, Le, Lt, Interval)):
        for name, word in words.items():
            if (limit := getattr(mark, name, None)) is not None:
                yield f"{word} {limit:,}"


def markdown(params: Iterable[Described]) -> str:
    """Return a page of all params."""
    lines = [
        "# Params",
        "",
        "Written by `python -m pipeline params --markdown` from the stages' signatures and the",
        "comments in `params.yaml`. A changed param reruns the stages that read it, the stages",
        "after them, and `report`, which shows all params.",
    ]
    before = None
    for one in params:
        section = one.key.split(".")[0] if "." in one.key else "for several stages"
        if section != before:
            head = [
                "| param | default | allowed values | what it does | read by |",
                "|---|---|---|---|---|",
            ]
            lines += ["", f"## {section}", "", *head]
            before = section
        stages = ", ".join(one.stages)
        cells = (f"`{one.key}`", f"`{one.written()}`", one.allowed, one.about, stages)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the params on the terminal."""
    parser = parser_of("params", __doc__ or "")
    parser.add_argument("keys", nargs="*", metavar="KEY", help="keys or sections (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print a page in Markdown")
    parser.add_argument("--check", action="store_true", help="print only what is wrong")
    options = parser.parse_args()
    with one_line_errors():
        if options.check:
            check(FILE)
            return
        params = described(FILE)
        for key in options.keys:
            if not any(_is_in(one, key) for one in params):
                raise ParamError(
                    f"no param is called {key!r}; {suggest(key, (p.key for p in params))}"
                )
        shown = [p for p in params if not options.keys or any(_is_in(p, k) for k in options.keys)]
        if options.markdown:
            print(markdown(shown))
            return
        for one in shown:
            say(f"{one.key}: {one.written()}")
            for line in (one.about, f"allowed: {one.allowed}", f"read by: {', '.join(one.stages)}"):
                say(f"    {line}")


def _is_in(param: Described, key: str) -> bool:
    return param.key == key or param.key.startswith(f"{key}.")
