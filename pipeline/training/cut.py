"""Cut a network in two: a frozen trunk below a block, and the top from that block on."""

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
    """Cut a network before the first block, in running order, that contains a trained module.

    If the network is not a chain there (for example, if a functional pooling comes before the
    block), it is cut before an earlier block. A network whose forward pass begins with its first
    block can always be cut before that block.

    Raises NetworkError if the network can't be cut anywhere.
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
        f"{type(model).__name__} processes images before its first block, so it can't be cut "
        "there; choose another network for backbone.name"
    )


class _ReachedError(Exception):
    """Stops a forward pass at a block and carries the block's input out."""


class Cut:
    """A network cut before a block.

    `trunk` runs the part below the block and returns the block's input. `top` takes this input and
    returns the logits. Both run the network's own forward pass: the trunk leaves it at the block;
    in the top, all modules that finish before the block return their input. `is_chain` checks that
    the two together give the output of the whole network.
    """

    def __init__(self, model: nn.Module, block: str) -> None:
        self.model = model
        self.name = block
        self.block = model.get_submodule(block)
        self._passing = False
        # The head doesn't need the rest of the network's forward pass.
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
        """Restore the network's own forward pass."""
        for module in self._below:
            module.forward = inspect.unwrap(module.forward)

    def is_chain(self) -> bool:
        """Return whether trunk and top give the whole network's logits, to the bit."""
        with evaluating(self.model), torch.inference_mode():
            shape = (8, 3, TRACE_SIZE, TRACE_SIZE)
            x = torch.linspace(-1, 1, math.prod(shape), device=device_of(self.model)).view(shape)
            try:
                same = torch.equal(self.top(self.trunk(x)), self.model(x))
            except (RuntimeError, ValueError) as error:
                if is_out_of_memory(error):
                    raise
                same = False  # an operation whose input has the wrong shape
        return same
