"""From params.yaml and dvc.yaml to one validated call: a stage's signature is its schema.

A stage is a function with keyword-only, typed arguments. Those of type `Path` come from the
command line, and so from dvc.yaml; all others come from params.yaml, from the section with the
stage's name, or from where `Key` says. An argument whose type is a dataclass takes each of its
fields so. There are no defaults: params.yaml is the only place that holds a value.
"""

import argparse
import csv
import inspect
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import yaml
from annotated_types import Interval
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import ParamError, PipelineError, near

Stage = Callable[..., dict[str, float]]
STRICT = ConfigDict(strict=True, allow_inf_nan=False)  # no number from a string, no NaN


@dataclass(frozen=True)
class Key:
    """Where in params.yaml an argument is found, if not in its stage's own section."""

    path: str
    foreign: bool = False  # in a section that another stage reads and checks as a whole


Seed = Annotated[int, Key("seed"), Interval(ge=0, lt=2**32)]


class Loader(yaml.SafeLoader):
    """YAML without code or repeated keys, reading `5e-5` as a number (1.1 wants a dot there)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice in one section: YAML would take the last in silence."""
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands twice in one section", key.start_mark
                )
        return dict(super().construct_mapping(node, deep))


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


@dataclass(frozen=True)
class Param:
    """One value that a stage takes from params.yaml."""

    key: str  # dotted, in params.yaml
    foreign: bool  # another stage checks its section
    hint: Any  # its type, with its limits
    argument: str
    field: str = ""  # of the argument, where that is a dataclass


def stage_params(stage: Stage) -> list[Param]:
    """List what a stage takes from params.yaml, in the order of its signature."""
    params = []
    for argument, hint in get_type_hints(stage, include_extras=True).items():
        if argument == "return" or hint is Path:
            continue
        if is_dataclass(hint):
            inner = get_type_hints(hint, include_extras=True)
            params += [
                Param(**_place(stage, name, kind), hint=kind, argument=argument, field=name)
                for name, kind in inner.items()
            ]
        else:
            params.append(Param(**_place(stage, argument, hint), hint=hint, argument=argument))
    return params


def _place(stage: Stage, name: str, hint: Any) -> dict[str, Any]:
    marks = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Key)]
    mark = marks[0] if marks else Key(f"{stage.__name__}.{name}")
    return {"key": mark.path, "foreign": mark.foreign}


def path_names(stage: Stage) -> list[str]:
    """List the arguments that come from the command line."""
    return [name for name, hint in get_type_hints(stage).items() if hint is Path]


def read_params(file: Path) -> dict[str, Any]:
    """Read params.yaml as nested dictionaries.

    Raises ParamError if it is missing, isn't YAML or isn't sections of keys.
    """
    try:
        params = yaml.load(file.read_text(encoding="utf-8"), Loader)  # noqa: S506, a SafeLoader
    except FileNotFoundError:
        raise ParamError(f"{file}: no such file; run this in the project's folder") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise ParamError(f"{file}: not readable as YAML: {line}") from None
    if not isinstance(params, dict):
        raise ParamError(f"{file}: expected sections such as 'prepare:', found {params!r}")
    return params


def arguments(stage: Stage, params: dict[str, Any]) -> dict[str, Any]:
    """Take a stage's arguments from the params, checked against its signature.

    Raises ParamError naming the key and the value: unknown, missing, of a wrong type or out of
    range.
    """
    wanted = stage_params(stage)
    _refuse_unknown({param.key for param in wanted if not param.foreign}, params)
    values: dict[str, Any] = {}
    for param in wanted:
        value = _checked(param, _look_up(param.key, params))
        if param.field:
            values.setdefault(param.argument, {})[param.field] = value
        else:
            values[param.argument] = value
    hints = get_type_hints(stage)
    return {
        name: hints[name](**value) if is_dataclass(hints[name]) else value
        for name, value in values.items()
    }


def _checked(param: Param, value: Any) -> Any:
    try:
        return TypeAdapter(param.hint, config=STRICT).validate_python(value)
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        said = said[0].lower() + said[1:]
        raise ParamError(f"params.yaml: {param.key} = {value!r}: {said}") from None


def _refuse_unknown(keys: set[str], params: dict[str, Any]) -> None:
    for section in {key.split(".")[0] for key in keys if "." in key}:
        known = [key.removeprefix(f"{section}.") for key in keys if key.startswith(f"{section}.")]
        found = params.get(section)
        if not isinstance(found, dict):
            raise ParamError(f"params.yaml: no section '{section}:'; {near(section, params)}")
        for name in found:
            if name not in known:
                hint = near(str(name), sorted(known))
                raise ParamError(f"params.yaml: unknown key {section}.{name}; {hint}")


def _look_up(key: str, params: dict[str, Any]) -> Any:
    value: Any = params
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ParamError(f"params.yaml: {key} is missing")
        value = value[part]
    return value


def main(stage: Stage) -> None:
    """Run a stage from the command line; a user's error ends it with one line and exit code 1.

    What the stage returns is written to its `--timing` file, with the seconds it took in all.
    Set PIPELINE_DEBUG=1 to see the traceback of an error.
    """
    summary = (inspect.getdoc(stage) or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(
        prog=f"python -m pipeline.{stage.__name__}", description=summary
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--timing", type=Path, required=True)
    for name in path_names(stage):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = vars(parser.parse_args())
    params, timing = options.pop("params"), options.pop("timing")
    with one_line_errors():
        start = time.perf_counter()
        rates = stage(**options, **arguments(stage, read_params(params)))
        rates = {"seconds": time.perf_counter() - start, **rates}
        write_json(timing, {stage.__name__: {k: round(v, 3) for k, v in rates.items()}})


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a user's error as one line and exit with 1; with PIPELINE_DEBUG=1 let it through."""
    try:
        yield
    except PipelineError as error:
        if os.environ.get("PIPELINE_DEBUG"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command to start this stage again")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`, which takes its place when all went well."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file whole: who reads it sees the old or the new one, never a half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def write_csv(file: Path, lines: Iterable[Sequence[object]]) -> None:
    """Write lines of values, the header first, as a CSV file, whole."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(file, text.getvalue())


def write_json(file: Path, content: object) -> None:
    """Write a JSON file whole, in the order given, the same bytes for the same content."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
