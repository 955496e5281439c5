"""Cut a network in two: a frozen trunk below a block, and the top from that block on."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pipeline.nets.backbone import head_name
from pipeline.nets.blocks import chain, evaluating, is_inside, trace, traced_size
from pipeline.nets.device import device_of
from pipeline.stage_runtime.errors import NetworkError, is_out_of_memory


def cut_below(model: nn.Module, trained: Sequence[str], size: int | None = None) -> "Cut":
    """Cut a network before the first block, in running order, that contains a trained module.

    If the network is not a chain there (for example, if a functional pooling comes before the
    block), it is cut before an earlier block. A network whose forward pass begins with its first
    block can always be cut before that block. `size` is the side of the images, by default the one
    that the network is traced with.

    Raises NetworkError if the network can't be cut anywhere.
    """
    blocks = chain(model)
    lowest = next(
        i
        for i, block in enumerate(blocks)
        if any(is_inside(name, block) or is_inside(block, name) for name in trained)
    )
    for block in reversed(blocks[: lowest + 1]):
        for stand_ins in (False, True):
            cut = Cut(model, block, size, stand_ins)
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
    in the top, all modules that finish before the block return their input. If operations lie
    between them, such as adding a transformer's positions, they return zeros of the right shape
    instead (`stand_ins`), and the block gets its input put in. `is_chain` checks that the two
    together give the output of the whole network.
    """

    def __init__(
        self, model: nn.Module, block: str, size: int | None = None, stand_ins: bool = False
    ) -> None:
        self.model = model
        self.name = block
        self.block = model.get_submodule(block)
        self.size = size or traced_size(model)
        self._stand_ins = stand_ins
        self._outputs: dict[nn.Module, Any] = {}  # of the modules below, for one image
        self._passing = False
        # The head doesn't need the rest of the network's forward pass.
        self._is_head = block == head_name(model)
        self._below = [] if self._is_head else self._done_before(block)
        for module in self._below:
            module.forward = self._passed(module, module.forward)
        if stand_ins:
            self._record()

    def _done_before(self, block: str) -> list[nn.Module]:
        calls = trace(self.model)
        start = next(call.start for call in calls if call.name == block)
        done = [call.name for call in calls if call.end < start]
        outer = [n for n in done if not any(is_inside(n, d) for d in done if d != n)]
        return [self.model.get_submodule(name) for name in outer]

    def _passed(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def either(*given: Any, **more: Any) -> Any:
            if not self._passing or not given or not isinstance(given[0], Tensor):
                return forward(*given, **more)  # without images, it gives the same in the top
            if not self._stand_ins:
                return given[0]
            of_one = self._outputs[module]
            return tree_map_only(
                Tensor, lambda t: t.repeat(len(given[0]), *(1,) * (t.ndim - 1)), of_one
            )

        return either

    def _record(self) -> None:
        """Run the trunk on one image, and keep zeros of the shapes that its modules return."""
        handles = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._outputs[module] = tree_map_only(Tensor, torch.zeros_like, output)

        for module in self._below:
            handles.append(module.register_forward_hook(keep))
        try:
            with evaluating(self.model), torch.no_grad():
                self.trunk(torch.zeros(1, 3, self.size, self.size, device=device_of(self.model)))
        finally:
            for handle in handles:
                handle.remove()

    def trunk(self, x: Tensor) -> Tensor:
        """Compute the block's input (B, ...) from normalised images (B, 3, H, W)."""

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
            logits: Tensor = self._run_with(z) if self._stand_ins else self.model(z)
            return logits
        finally:
            self._passing = False

    def _run_with(self, z: Tensor) -> Tensor:
        """Run the network on no images, and put the block's input in."""

        def put_in(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (z, *inputs[1:])

        handle = self.block.register_forward_pre_hook(put_in)
        try:
            logits: Tensor = self.model(z.new_zeros(len(z), 3, self.size, self.size))
            return logits
        finally:
            handle.remove()

    def undo(self) -> None:
        """Restore the network's own forward pass."""
        for module in self._below:
            module.forward = inspect.unwrap(module.forward)

    def is_chain(self) -> bool:
        """Return whether trunk and top give the whole network's logits, to the bit."""
        with evaluating(self.model), torch.inference_mode():
            shape = (8, 3, self.size, self.size)
            x = torch.linspace(-1, 1, math.prod(shape), device=device_of(self.model)).view(shape)
            try:
                same = torch.equal(self.top(self.trunk(x)), self.model(x))
            except (RuntimeError, ValueError) as error:
                if is_out_of_memory(error):
                    raise
                same = False  # an operation whose input has the wrong shape
        return same
