"""A network in two: a frozen trunk up to a block, and the top from there on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.nets.blocks import chain, is_inside, trace


def cut_point(model: nn.Module, trained: Sequence[str]) -> str:
    """Name the first block, in running order, that encloses a trained module."""
    for block in chain(model):
        if any(is_inside(name, block) or is_inside(block, name) for name in trained):
            return block
    raise ValueError(f"none of {trained} is in a block")


class _ReachedError(Exception):
    """Carries a block's input out of a forward pass that need not go on."""


class Cut:
    """A network cut before a block.

    `trunk` runs what lies below and gives the block's input; `top` takes that and gives the
    logits. Both run the network's own forward: the trunk leaves it at the block, the top passes
    its input through everything that is complete before the block. This holds for a network that
    is a chain at the cut; the constructor checks it.
    """

    def __init__(self, model: nn.Module, block: str) -> None:
        self.model = model
        self.name = block
        self.block = model.get_submodule(block)
        self._passing = False
        for module in self._below(block):
            module.forward = self._passed(module.forward)
        self._check()

    def _below(self, block: str) -> list[nn.Module]:
        calls = trace(self.model)
        start = next(call.start for call in calls if call.name == block)
        done = [call.name for call in calls if call.end < start]
        outer = [n for n in done if not any(is_inside(n, d) for d in done if d != n)]
        return [self.model.get_submodule(name) for name in outer]

    def _passed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def either(x: Any, *rest: Any, **more: Any) -> Any:
            return x if self._passing else forward(x, *rest, **more)

        return either

    def trunk(self, x: Tensor) -> Tensor:
        """Compute the block's input (B, D, h, w) from normalised images (B, 3, H, W)."""

        def leave(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _ReachedError(inputs[0])

        handle = self.block.register_forward_pre_hook(leave)
        try:
            self.model(x)
        except _ReachedError as reached:
            tensor: Tensor = reached.args[0]
            return tensor
        finally:
            handle.remove()
        raise AssertionError("the block was not reached")

    def top(self, z: Tensor) -> Tensor:
        """Compute the logits (B, C) from the block's input."""
        self._passing = True
        try:
            logits: Tensor = self.model(z)
            return logits
        finally:
            self._passing = False

    def _check(self) -> None:
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        with torch.inference_mode():
            x = torch.linspace(-1, 1, 8 * 3 * 64 * 64).view(8, 3, 64, 64)
            same = torch.equal(self.top(self.trunk(x)), self.model(x))
        for module in training:
            module.training = True
        if not same:
            raise ValueError("the network is no chain at this block")
