"""How a block's output is laid out: feature maps in either order, or tokens with others before."""

import math
from typing import Literal, NamedTuple

from torch import Tensor, nn

CLASS_TOKENS = ("cls_token", "class_token")  # as timm and torchvision call the parameter


class Layout(NamedTuple):
    """Where the pixels and the channels of a block's output (B, ...) are."""

    kind: Literal["maps", "maps_last", "tokens"]  # (B, D, h, w), (B, h, w, D) or (B, N, D)
    side: int  # pixels
    before: int = 0  # tokens that are no patches: class token, registers

    def as_maps(self, output: Tensor) -> Tensor:
        """Return the output as feature maps (B, D, h, w); of tokens, the patches."""
        if self.kind == "maps_last":
            return output.permute(0, 3, 1, 2)
        if self.kind == "tokens":
            patches = output[:, self.before :].transpose(1, 2)  # (B, D, N)
            return patches.reshape(*patches.shape[:2], self.side, self.side)
        return output


def layout_of(shape: tuple[int, ...]) -> Layout | None:
    """Return the layout of a block's output for square images, or None if it has no pixels."""
    if len(shape) == 3:
        side = math.isqrt(shape[1])
        return Layout("tokens", side, shape[1] - side * side) if side else None
    if len(shape) == 4:
        last = shape[1] == shape[2] != shape[3]
        return Layout("maps_last" if last else "maps", shape[2])
    return None


def has_class_token(model: nn.Module) -> bool:
    """Return whether the first token of a network stands for the whole image."""
    return any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in model.named_parameters())
