"""What `auto` in params.yaml stands for: functions of the network, whatever its weights are."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.nets.backbone import head_name
from pipeline.nets.blocks import chain, evaluating, fails_at, is_inside, made_for
from pipeline.nets.device import device_of
from pipeline.stage_runtime.errors import ParamError
from pipeline.stage_runtime.schema import Auto

USUAL, STEP = 224, 32  # pixels: the side where a network names none, and what most sides divide by
# Shares of the side of extract: 160 and 192 of 224 pixels, half and three quarters of the compute.
STAGE_1_AT, STAGE_2_AT = 5 / 7, 6 / 7
TRAINED_SHARE = 0.6  # of the compute, at most, in what stage 1 trains


def input_size(model: nn.Module, asked: int | Auto, packed: int, of: float = 1.0) -> int:
    """Return the side of a network's input in pixels: as asked, or a share of its usual one.

    The usual one is at most that of the packed images, and so is the result. A share is rounded to
    a multiple of STEP. If the network doesn't take that size, the nearest one that it takes is
    used. Raises ParamError if there is none.
    """
    if asked != "auto":
        return asked
    own = usual_size(model)
    whole = min(own, packed)
    wanted = whole if of == 1 else min(max(STEP, STEP * round(of * whole / STEP)), packed)
    near = sorted(range(wanted - STEP // 2, wanted + STEP // 2), key=lambda s: abs(s - wanted))
    for side in (*near, own):
        if side <= packed and fails_at(model, side) is None:
            return side
    raise ParamError(
        f"backbone.name: {type(model).__name__} takes images of {own} px, and the packed ones have "
        f"{packed}; set prepare.size to {own}"
    )


def usual_size(model: nn.Module) -> int:
    """Return the side that a network was made for, or USUAL if it names none."""
    return next(iter(made_for(model)), USUAL)


def top_blocks(model: nn.Module) -> list[str]:
    """Return the blocks next to the head that hold at most TRAINED_SHARE of the compute."""
    head = head_name(model)
    # Some name a size that isn't a multiple of their patches.
    shares = compute_shares(model, input_size(model, "auto", usual_size(model)))
    kept: list[str] = []
    share = 0.0
    for block in reversed(chain(model)):
        share += shares.get(block, 0.0)
        if share > TRAINED_SHARE:
            break
        has_parameters = any(True for _ in model.get_submodule(block).parameters())
        if has_parameters and not is_inside(head, block):
            kept.append(block)
    return kept[::-1]


def compute_shares(model: nn.Module, size: int) -> dict[str, float]:
    """Return each module's share of the network's multiplications, by PyTorch's FlopCounterMode.

    The network's parameters must be frozen: the counter fails on some that could train.
    """
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, device=device_of(model)))
    flops = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    outer = f"{type(model).__name__}."
    return {name.removeprefix(outer): n / flops["Global"] for name, n in flops.items()}
