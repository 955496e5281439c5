"""torchvision, and timm which needs it, made to import beside a CPU build of torch.

The compiled ops of torchvision's wheel don't load there. Both are imported when they are asked for,
as that takes seconds: `from pipeline.vision import timm`, or `vision.torchvision` where needed.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Import one of the two. Raises AttributeError for any other name."""
    if name not in ("timm", "torchvision"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _declare_ops()
    return import_module(name)


def _declare_ops() -> None:
    """Declare the schemas of two detection ops: no classifier calls them, the import wants them."""
    import torch

    for name, schema in (
        ("nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
        ("qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)
