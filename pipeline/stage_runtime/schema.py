"""Validate a stage's arguments from params.yaml and dvc.yaml: its signature is the schema.

A stage is a function with keyword-only, typed arguments. Those of type `Path` come from the
command line, and thus from dvc.yaml; all others come from params.yaml, from the section with the
stage's name, or from the key that `Key` names. If an argument's type is a dataclass, each of its
fields is read in this way. There are no defaults: params.yaml is the only place that holds a value.
An argument of type `Resume` is the resume state, one of type `AllParams` is all of params.yaml.
"""

import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Interval
from pydantic import ConfigDict, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline.stage_runtime.errors import ParamError, suggest
from pipeline.stage_runtime.resume import Resume

Out = Annotated[Path, "written"]  # a path that the stage writes; it reads any other
Auto = Literal["auto"]  # a value that follows from the data or the network
# What "better" means where a choice is made.
Measure = Literal["accuracy", "balanced_accuracy", "f1_macro", "auroc", "log_loss"]
AllParams = Annotated[dict[str, Any], "all"]  # of params.yaml, to be shown
Stage = Callable[..., dict[str, float]]
STRICT = ConfigDict(strict=True, allow_inf_nan=False)  # no number from a string, no NaN
MOST_BYTES = 100_000  # of params.yaml; the default one has five thousand
SHOWN = 120  # characters of a value in a message


@dataclass(frozen=True)
class Key:
    """The key in params.yaml of an argument that is not in its stage's own section."""

    path: str
    foreign: bool = False  # in a section that another stage reads and checks as a whole


STAGES = ("prepare", "extract", "probe", "advise", "stage1", "stage2", "evaluate", "report")
# The top level of params.yaml: single values, and one section per stage or subject.
TOP = (
    *("seed", "precision", "measure", "sample_weight", "class_weight", "flips", "augment"),
    *("prepare", "backbone", "extract", "probe", "stage1", "stage2", "evaluate"),
)
READS = "reads"  # marks a param that names files, which the stage reads as data
Seed = Annotated[int, Key("seed"), Interval(ge=0, lt=2**32)]


def load_yaml(text: str) -> Any:
    """Read YAML as DVC does: version 1.2, where 5e-5 is a number and `no` a word, without code.

    Raises YAMLError, including DuplicateKeyError: other readers silently take the last of two keys.
    """
    return YAML(typ="safe", pure=True).load(text)


def short(value: object) -> str:
    """Return the repr of a value, shortened."""
    writer = reprlib.Repr()
    writer.maxlevel, writer.maxstring, writer.maxother = 3, SHOWN, SHOWN
    text = writer.repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


@dataclass(frozen=True)
class Param:
    """One value that a stage takes from params.yaml."""

    key: str  # dotted, in params.yaml
    foreign: bool  # another stage checks its section
    hint: Any  # its type, with its limits
    argument: str
    field: str = ""  # of the argument, where that is a dataclass


def stage_params(stage: Stage) -> list[Param]:
    """List the params of a stage, in the order of its signature."""
    params = []
    for argument, hint in get_type_hints(stage, include_extras=True).items():
        if argument == "return" or hint in (Path, Out, Resume, AllParams):
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


def sources(stage: Stage, params: dict[str, Any]) -> list[Path]:
    """List the paths in a stage's params that the stage reads."""
    hints = get_type_hints(stage, include_extras=True)
    return [Path(params[n]) for n, h in hints.items() if READS in getattr(h, "__metadata__", ())]


def read_params(file: Path) -> dict[str, Any]:
    """Read params.yaml as nested dictionaries.

    Raises ParamError if it is missing, isn't YAML or doesn't consist of sections.
    """
    try:
        if (size := file.stat().st_size) > MOST_BYTES:
            raise ParamError(f"{file}: {size:,} bytes; at most {MOST_BYTES:,} are allowed")
        params = load_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamError(f"{file}: no such file; run this in the project's folder") from None
    except DuplicateKeyError as error:
        key = str(error.problem).split('"')[1]
        raise ParamError(
            f"{file}: {key!r} occurs twice in one section (line {error.problem_mark.line + 1}); "
            "remove one"
        ) from None
    except MarkedYAMLError as error:
        said = " ".join(part for part in (error.context, error.problem) if part)
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ParamError(f"{file}: not readable as YAML: {said}{line}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ParamError(f"{file}: not readable as YAML: {said}") from None
    except RecursionError:  # brackets a thousand deep
        raise ParamError(f"{file}: not readable as YAML: nested too deeply") from None
    except (ValueError, TypeError, OverflowError) as error:
        # A date of month 13.
        raise ParamError(f"{file}: not readable as YAML: {short(error)}") from None
    if isinstance(params, dict) and (lists := [key for key in params if isinstance(key, tuple)]):
        raise ParamError(
            f"{file}: not readable as YAML: a list as a key ({short(lists[0])}); "
            "write a name before the colon"
        )
    if not isinstance(params, dict):
        raise ParamError(f"{file}: expected sections such as 'prepare:', found {short(params)}")
    return params


def flat(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dictionaries with dotted keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def arguments(stage: Stage, params: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's arguments from the params, validated by its signature.

    Raises ParamError naming the key and the value that is unknown, missing, of a wrong type or out
    of range.
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
    for name in params:
        if name not in (*TOP, stage.__name__):
            said = str(name)[:80]
            raise ParamError(f"params.yaml: unknown key {said}; {suggest(said, TOP)}")
    hints = get_type_hints(stage, include_extras=True)
    values |= {name: params for name, hint in hints.items() if hint == AllParams}
    return {
        name: hints[name](**value) if is_dataclass(hints[name]) else value
        for name, value in values.items()
    }


def _checked(param: Param, value: Any) -> Any:
    try:
        return TypeAdapter(param.hint, config=STRICT).validate_python(value)
    except ValidationError as error:
        found = error.errors()
        # Of a union, what is wrong with a value of the right type tells more than the other types.
        precise = [one for one in found if not one["type"].endswith(("_type", "literal_error"))]
        said = " or ".join(one["msg"][0].lower() + one["msg"][1:] for one in precise or found)
        raise ParamError(f"params.yaml: {param.key} = {short(value)}: {said}") from None
    except RecursionError:
        raise ParamError(f"params.yaml: {param.key} contains itself") from None


def _refuse_unknown(keys: set[str], params: dict[str, Any]) -> None:
    for section in sorted({key.split(".")[0] for key in keys if "." in key}):
        known = [key.removeprefix(f"{section}.") for key in keys if key.startswith(f"{section}.")]
        found = params.get(section)
        if not isinstance(found, dict):
            raise ParamError(f"params.yaml: no section '{section}:'; {suggest(section, params)}")
        for name in found:
            if name not in known:
                said = str(name)[:80]
                raise ParamError(
                    f"params.yaml: unknown key {section}.{said}; {suggest(said, sorted(known))}"
                )


def _look_up(key: str, params: dict[str, Any]) -> Any:
    value: Any = params
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ParamError(f"params.yaml: {key} is missing")
        value = value[part]
    return value
