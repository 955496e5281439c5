"""torchvision, and timm which needs it, made to import beside any build of torch.

The compiled ops of torchvision's wheel don't load beside another build than their own. Both are
imported when they are asked for, as that takes seconds: `from
pipeline.nets.torchvision_import import timm`, or `torchvision_import.torchvision` where needed.
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
    """Import one of the two. Raises AttributeError for any other name."""
    if name not in ("timm", "torchvision"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _declare_ops()
    with _compiler_not_loaded():
        return import_module(name)


@contextmanager
def _compiler_not_loaded() -> Iterator[None]:
    """Spare the import of PyTorch's compiler, a third of the time that a stage takes to start.

    torchvision asks it whether detection may be compiled, and timm marks what must not be; here
    nothing is. Who needs the compiler later imports it as ever.
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
    """Load torchvision's compiled ops, or else declare the two that its import wants.

    Those are of detection: no classifier calls them. Where the compiled ones load, as beside
    PyTorch's build for CUDA, a second declaration would abort the process.
    """
    import torch

    folder = find_spec("torchvision")
    for library in Path(folder.origin or "").parent.glob("_C*.*") if folder else ():
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        except OSError:  # of another build of PyTorch
            continue
        return
    for name, schema in (
        ("nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
        ("qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)
