"""Frozen is frozen: parameters, and the BatchNorm statistics that `requires_grad` leaves moving."""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.nets.blocks import is_inside


def freeze_all_but(model: nn.Module, trained: Sequence[str], batchnorm: str) -> list[str]:
    """Make only the named modules trainable; returns the names of the trainable parameters.

    Everything else stays in eval mode through every later `model.train()`: no dropout there, and
    no BatchNorm statistics that move. With `batchnorm: frozen` those of the trained modules stay
    too, and they normalise by their running statistics.
    """
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(is_inside(name, module) for module in trained)
        parameter.grad = None  # one left from before would still move the weight
        if parameter.requires_grad:
            trainable.append(name)
    for name, module in model.named_modules():
        inside = any(is_inside(name, t) or is_inside(t, name) or not name for t in trained)
        if not inside or (batchnorm == "frozen" and isinstance(module, _BatchNorm)):
            _stay_in_eval(module)
    return trainable


def everything(model: nn.Module) -> list[str]:
    """Name the modules that hold all of a network's parameters."""
    return [name for name, _ in model.named_children()]


def _stay_in_eval(module: nn.Module) -> None:
    module.eval()
    module.train = lambda mode=True: module  # type: ignore[method-assign]
