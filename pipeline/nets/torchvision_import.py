"""Import torchvision, and timm which needs it, with any build of torch.

The compiled operators of torchvision's wheel load only with the build of torch that they were
compiled for. Both packages take seconds to import, so they are imported on first use: `from
pipeline.nets.torchvision_import import timm`, or `torchvision_import.torchvision`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"


def __getattr__(name: str) -> Any:
    """Import timm or torchvision. Raises AttributeError for any other name."""
    if name not in ("timm", "torchvision"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _declare_ops()
    with _compiler_not_loaded():
        return import_module(name)


@contextmanager
def _compiler_not_loaded() -> Iterator[None]:
    """Skip the import of PyTorch's compiler, a third of the start-up time of a stage.

    torchvision asks the compiler whether detection can be compiled, and timm marks functions that
    must not be compiled; nothing is compiled here. The compiler can be imported later as usual.
    """
    if COMPILER in sys.modules:
        yield
        return
    utils = ModuleType(f"{COMPILER}.utils")
    vars(utils)["is_compile_supported"] = lambda device_type: False
    compiler = ModuleType(COMPILER)
    vars(compiler)["disable"] = lambda function, *how, **more: function
    stand_ins = {COMPILER: compiler, utils.__name__: utils}
    sys.modules |= stand_ins
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _declare_ops() -> None:
    """Load torchvision's compiled operators, or else declare the two that its import needs.

    These two are for detection; no classifier calls them. If the compiled ones load, as with
    PyTorch's build for CUDA, a second declaration would abort the process.
    """
    import torch

    folder = find_spec("torchvision")
    for library in Path(folder.origin or "").parent.glob("_C*.*") if folder else ():
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        except OSError:  # compiled for another build of PyTorch
            continue
        return
    for name, schema in (
        ("nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
        ("qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)
