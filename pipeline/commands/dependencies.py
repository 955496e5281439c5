"""Write the source files that each stage imports into dvc.yaml.

    python -m pipeline dependencies            # after a new import
    python -m pipeline dependencies --check    # exit code 1 if dvc.yaml has others
    python -m pipeline dependencies --table    # docs/files.md

A folder is listed if the stage imports every module in it, otherwise its files are.
"""

import ast
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.stage_runtime.files import write_text
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import STAGES

ROOT = Path(__file__).parents[2]
GRAPH = Path("dvc.yaml")


@cache
def imported(file: str) -> frozenset[str]:
    """Return all names that a file may import; `from a import b` counts as a and as a.b."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def file_of(name: str) -> str | None:
    """Return the project's file that a dotted name stands for, if there is one."""
    file = f"{name.replace('.', '/')}.py"
    return file if name.startswith("pipeline.") and (ROOT / file).exists() else None


def closure(stage: str) -> set[str]:
    """List the project's files that a stage's file imports, directly or not, itself included."""
    found, left = set(), {f"pipeline/{stage}.py"}
    while left:
        file = left.pop()
        found.add(file)
        left |= {f for name in imported(file) if (f := file_of(name))} - found
    return found


def grouped(files: Iterable[str]) -> list[str]:
    """Replace files by their folder if all of its files are listed; sort by name."""
    files, listed = set(files), []
    for folder in {str(Path(file).parent) for file in files} - {"pipeline"}:
        inside = {f"{folder}/{file.name}" for file in (ROOT / folder).glob("*.py")}
        if inside <= files:
            files -= inside
            listed.append(folder)
    return sorted([*listed, *files])


def written(text: str) -> str:
    """Return a dvc.yaml whose stages list the code that they depend on, otherwise unchanged."""
    for stage in STAGES:
        # The stage's block up to its deps, data included, and the lines of code among them.
        block = re.compile(
            rf"(^  {stage}:\n(?:(?!^  \w).*\n)*?    deps:\n(?:      - (?!pipeline/).*\n)*)"
            r"(?:      - pipeline/.*\n)*",
            re.MULTILINE,
        )
        found = block.search(text)
        assert found, stage
        listed = "".join(f"      - {path}\n" for path in grouped(closure(stage)))
        text = f"{text[: found.end(1)]}{listed}{text[found.end() :]}"
    return text


def table() -> list[str]:
    """Return a page that lists what each file holds, and which stages a change there reruns."""
    of = {stage: closure(stage) for stage in STAGES}
    lines = [
        "# Files",
        "",
        "Written by `python -m pipeline dependencies --table` from the first lines of the files",
        "and the imports of the stages. A change in a file reruns the stages beside it, and then",
        "the stages that read their outputs, if the outputs differ.",
        "",
        "Each test in `tests/` checks a claim against something independent. `bench/` measures",
        "speed, `runs/` measures accuracy over many runs.",
    ]
    before = None
    for file in sorted((ROOT / "pipeline").rglob("*.py"), key=lambda f: (f.parent, f)):
        name = file.relative_to(ROOT).as_posix()
        folder = name.rpartition("/")[0]
        if folder != before:
            head = ["| file | holds | a change reruns |", "|---|---|---|"]
            lines += ["", f"## {folder}/", "", *head]
            before = folder
        about = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")
        stages = ", ".join(stage for stage in STAGES if name in of[stage]) or "nothing"
        lines.append(f"| `{file.stem}` | {' '.join(about[0].split())} | {stages} |")
    return lines


def main() -> None:
    """Write or check dvc.yaml, or print the table."""
    parser = parser_of("dependencies", __doc__ or "")
    parser.add_argument("--check", action="store_true", help="check, and write nothing")
    parser.add_argument("--table", action="store_true", help="print the table, and write nothing")
    options = parser.parse_args()
    with one_line_errors():
        if options.table:
            print("\n".join(table()))
            return
        before = GRAPH.read_text(encoding="utf-8")
        after = written(before)
        if after == before:
            say("dvc.yaml lists the code that stages import")
        elif options.check:
            sys.exit("error: dvc.yaml lists other code; run `python -m pipeline dependencies`")
        else:
            write_text(GRAPH, after)
            say("dvc.yaml is written; `dvc repro` reruns the stages with new dependencies")
