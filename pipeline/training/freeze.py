"""Freeze parameters, and BatchNorm statistics, which `requires_grad` alone doesn't freeze."""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.nets.blocks import is_inside
from pipeline.stage_runtime.errors import ParamError
from pipeline.stage_runtime.settings import world_size


def freeze_all_but(model: nn.Module, trained: Sequence[str], batchnorm: str) -> list[str]:
    """Make only the named modules trainable; return the names of the trainable parameters.

    An earlier call is undone first. All other modules stay in eval mode after every later
    `model.train()`: they have no dropout, and their BatchNorm statistics don't change. With
    `batchnorm: frozen` the BatchNorm layers of the trained modules stay in eval mode too, and
    normalise by their running statistics.
    """
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(is_inside(name, module) for module in trained)
        parameter.grad = None  # an old gradient would still change the weight
        if parameter.requires_grad:
            trainable.append(name)
    for name, module in model.named_modules():
        _may_train(module)
        inside = any(is_inside(name, t) or is_inside(t, name) or not name for t in trained)
        if not inside or (batchnorm == "frozen" and isinstance(module, _BatchNorm)):
            _stay_in_eval(module)
    return trainable


def refuse_shared_statistics(stage: str, batchnorm: str) -> None:
    """Raise ParamError if each process would normalise by its own part of a batch."""
    if batchnorm == "train" and world_size() > 1:
        raise ParamError(
            f"params.yaml: {stage}.batchnorm = 'train' (or weights from scratch) with several "
            "processes: PyTorch has no SyncBatchNorm on CPUs, so each process would use the "
            "statistics of its part of a batch; set it to frozen, or run one process"
        )


def everything(model: nn.Module) -> list[str]:
    """Return the names of the network's children and own tensors, which hold all its parameters.

    A transformer's class token and its position embedding are in no child.
    """
    own = [name for name, _ in model.named_parameters(recurse=False)]
    return [*(name for name, _ in model.named_children()), *own]


def _may_train(module: nn.Module) -> None:
    """Undo `_stay_in_eval`: the next `model.train()` reaches the module again."""
    vars(module).pop("train", None)


def _stay_in_eval(module: nn.Module) -> None:
    module.eval()
    module.train = lambda mode=True: module  # type: ignore[method-assign]
