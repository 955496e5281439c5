"""CNN codes at several depths in one forward pass."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets.backbone import head_name
from pipeline.nets.tokens import has_class_token, layout_of
from pipeline.probing.codes import LAST, SOURCE

Pooling = Literal["average", "max", "both"]


class Taps:
    """Collect globally pooled activations while a network runs, until closed.

    `both` concatenates averages and maxima; a maximum responds to small and rare structures. Of
    tokens, the patches are pooled, and the class token comes first, if there is one. The head's
    input and output aren't pooled.
    """

    def __init__(self, model: nn.Module, depths: Sequence[str], pooling: Pooling) -> None:
        self.model = model
        self.depths = list(depths)
        self.pooling = pooling
        self._class_token = has_class_token(model)
        self._codes: dict[str, Tensor] = {}
        self._handles = [self._hook(depth) for depth in dict.fromkeys(depths)]

    def _hook(self, depth: str) -> Any:
        def pooled(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._codes[depth] = pool(output, self.pooling, self._class_token)

        def head_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._codes[depth] = inputs[0].float()  # (B, D)

        def head_output(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._codes[depth] = output.float()  # (B, classes of the source)

        if depth in (LAST, SOURCE):
            head = self.model.get_submodule(head_name(self.model))
            if depth == SOURCE:
                return head.register_forward_hook(head_output)
            return head.register_forward_pre_hook(head_input)
        return self.model.get_submodule(depth).register_forward_hook(pooled)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Compute the codes of normalised images (B, 3, H, W): one tensor (B, D) per depth."""
        self._codes.clear()
        self.model(x)
        return [self._codes[depth] for depth in self.depths]

    def __enter__(self) -> "Taps":
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def pool(output: Tensor, pooling: Pooling, class_token: bool = False) -> Tensor:
    """Pool feature maps or tokens to float32 codes (B, D), or for `both` to (B, 2 D).

    The class token of tokens (B, N, D) comes first, as D more codes.
    """
    layout = layout_of(tuple(output.shape))
    codes = _pooled(layout.as_maps(output) if layout else output, pooling)
    if layout and layout.kind == "tokens" and layout.before and class_token:
        return torch.cat([output[:, 0].float(), codes], 1)
    return codes


def _pooled(maps: Tensor, pooling: Pooling) -> Tensor:
    """Pool feature maps (B, D, h, w) over their pixels."""
    batch, depth, height, width = maps.shape
    # As images of one column with w * D channels, which fill the processor's vectors even if D is
    # small. `avg_pool2d` sums in float32 without a float32 copy.
    column = maps.permute(0, 2, 3, 1).reshape(batch, height, 1, width * depth).permute(0, 3, 1, 2)
    parts = []
    if pooling != "max":
        means = F.avg_pool2d(column, (height, 1)).view(batch, width, depth)
        parts.append(means.float().mean(1))
    if pooling != "average":
        maxima = F.max_pool2d(column, (height, 1)).view(batch, width, depth)
        parts.append(maxima.amax(1).float())
    return torch.cat(parts, 1)
