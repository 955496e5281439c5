"""A network in two: a frozen trunk up to a block, and the top from there on."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.nets.backbone import head_name
from pipeline.nets.blocks import TRACE_SIZE, chain, evaluating, is_inside, trace
from pipeline.nets.device import device_of
from pipeline.stage_runtime.errors import NetworkError, is_out_of_memory


def cut_below(model: nn.Module, trained: Sequence[str]) -> "Cut":
    """Cut a network before the first block, in running order, that encloses a trained module.

    Where the network is no chain there (a functional pooling before the block, say), one block
    further down; before the very first block any network can be cut whose forward begins with it.

    Raises NetworkError for another one.
    """
    blocks = chain(model)
    lowest = next(
        i
        for i, block in enumerate(blocks)
        if any(is_inside(name, block) or is_inside(block, name) for name in trained)
    )
    for block in reversed(blocks[: lowest + 1]):
        cut = Cut(model, block)
        if cut.is_chain():
            return cut
        cut.undo()
    raise NetworkError(
        f"{type(model).__name__} computes with its images before its first block, which can't be "
        "cut off; choose another network for backbone.name"
    )


class _ReachedError(Exception):
    """Carries a block's input out of a forward pass that need not go on."""


class Cut:
    """A network cut before a block.

    `trunk` runs what lies below and gives the block's input; `top` takes that and gives the
    logits. Both run the network's own forward: the trunk leaves it at the block, the top passes
    its input through everything that is complete before the block; `is_chain` tells whether that
    gives what the whole network gives.
    """

    def __init__(self, model: nn.Module, block: str) -> None:
        self.model = model
        self.name = block
        self.block = model.get_submodule(block)
        self._passing = False
        # The head needs no more of the network's forward than itself.
        self._is_head = block == head_name(model)
        self._below = [] if self._is_head else self._done_before(block)
        for module in self._below:
            module.forward = self._passed(module.forward)

    def _done_before(self, block: str) -> list[nn.Module]:
        calls = trace(self.model)
        start = next(call.start for call in calls if call.name == block)
        done = [call.name for call in calls if call.end < start]
        outer = [n for n in done if not any(is_inside(n, d) for d in done if d != n)]
        return [self.model.get_submodule(name) for name in outer]

    def _passed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
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
        if self._is_head:
            head: Tensor = self.block(z)
            return head
        self._passing = True
        try:
            logits: Tensor = self.model(z)
            return logits
        finally:
            self._passing = False

    def undo(self) -> None:
        """Give the network its own forward back."""
        for module in self._below:
            module.forward = inspect.unwrap(module.forward)

    def is_chain(self) -> bool:
        """Tell whether trunk and top give the whole network's logits, to the bit."""
        with evaluating(self.model), torch.inference_mode():
            shape = (8, 3, TRACE_SIZE, TRACE_SIZE)
            x = torch.linspace(-1, 1, math.prod(shape), device=device_of(self.model)).view(shape)
            try:
                same = torch.equal(self.top(self.trunk(x)), self.model(x))
            except (RuntimeError, ValueError) as error:
                if is_out_of_memory(error):
                    raise
                same = False  # an operation that its input no longer fits
        return same
