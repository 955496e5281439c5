"""torchvision, and timm which needs it, made to import beside a CPU build of torch.

The compiled ops of torchvision's wheel don't load there.
"""

import torch

# Its import only wants the schemas of two detection ops that no classifier calls.
for _name, _schema in (
    ("nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ("qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
):
    if not hasattr(torch.ops.torchvision, _name):
        torch.library.define(f"torchvision::{_name}", _schema)

import timm  # noqa: E402, imports torchvision
import torchvision  # noqa: E402, needs the ops declared

__all__ = ["timm", "torchvision"]
