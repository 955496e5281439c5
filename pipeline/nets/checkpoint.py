"""Checkpoints: the weights as safetensors, with everything needed to use them in one JSON string.

safetensors writes several metadata keys in random order, so four saves could have four hashes. One
key with sorted JSON gives the same bytes each time.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pipeline.stage_runtime.errors import CheckpointError, one_line
from pipeline.stage_runtime.files import write_bytes

KEY = "pipeline"
T = TypeVar("T")


def write(file: Path, tensors: dict[str, np.ndarray[Any, Any]], meta: dict[str, Any]) -> None:
    """Write tensors and metadata atomically: a reader sees the old file or the new one."""
    data = save(
        {name: np.asarray(tensor, order="C") for name, tensor in sorted(tensors.items())},
        metadata={KEY: json.dumps(meta, sort_keys=True, ensure_ascii=False)},
    )
    write_bytes(file, data)


def read(file: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Read the tensors and metadata that `write` wrote.

    Raises CheckpointError if the file is missing, damaged or not a checkpoint of this pipeline.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            meta = (opened.metadata() or {}).get(KEY)
            if meta is None:
                raise CheckpointError(f"{file}: not a checkpoint of this pipeline (no metadata)")
            facts = json.loads(meta)
            if not isinstance(facts, dict):
                raise ValueError(f"metadata {meta[:40]}")
            names = opened.keys()  # the file can't be iterated itself
            return {name: opened.get_tensor(name) for name in names}, facts
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; run `dvc repro` or `dvc pull`") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{file}: damaged ({said}); run `dvc checkout` or repeat") from None


def digest(tensors: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """Return the SHA-256 over names, types, shapes and values of tensors, in the order of names."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        found.update(np.ascontiguousarray(tensor).tobytes())
    return found.hexdigest()


def strip_prefix(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return the tensors whose names begin with a prefix, without the prefix."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


@contextmanager
def checked_metadata(file: Path) -> Iterator[None]:
    """Convert the errors that contradictory metadata may cause into a CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        said = one_line(error, 120)
        raise CheckpointError(
            f"{file}: its metadata are inconsistent ({type(error).__name__}: {said}); "
            "run `dvc checkout --force`, or choose another file"
        ) from None


def refuse_other_classes(
    stage: str, file: Path, classes: Sequence[str], packed: Sequence[str]
) -> None:
    """Raise CheckpointError if a stage's output has other classes than the packed images."""
    if list(classes) != list(packed):
        raise CheckpointError(
            f"{file}: its classes {classes} aren't those of the images, {packed}; "
            f"run `dvc repro {stage}`"
        )


def versions() -> dict[str, str]:
    """Return the versions of the numerical libraries, for a checkpoint's metadata."""
    names = ("torch", "torchvision", "timm", "numpy")
    # Without the local part: +cpu and +cu126 say which build, not which version.
    return {name: metadata.version(name).split("+")[0] for name in names}
