"""Two runs trained alike: they end closer to each other than training moved them, by far."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from pipeline.images.shards import read_facts
from pipeline.training.start import start_network

State = Mapping[str, NDArray[Any]]
# Of what training moved: over all weights, and of one tensor, whose gradient may be near zero.
WEIGHTS, TENSOR, LOSS = 0.01, 0.1, 0.01
LEAST = 1e-3  # how far training moves all weights, in parts of their norm
# Params that move a small network far in a few steps of both stages, and keep what they reach: the
# start of either stage is never the best there is, nor a mean with it.
FAR: dict[str, dict[str, Any]] = {
    "stage1": {"head_init": "random", "lr": 5.0e-3},
    "stage2": {"lr": 1.0e-3, "interpolate": False},
}


def start_of_stage1(prepared: Path, probe: Path, size: int, scratch: Path) -> dict[str, Any]:
    """Give the weights that stage 1 starts from, with a random head of seed 0, in float32."""
    torch.manual_seed(0)
    network, _ = start_network(probe, read_facts(prepared), size, "random", "fp32")
    network.save(scratch / "start.safetensors")
    return load_file(scratch / "start.safetensors")


def assert_trained_alike(start: State, one: State, two: State) -> None:
    """Refuse weights that are further apart than a small part of their movement from `start`.

    In the Euclidean norm, over all and of each tensor; what stayed in one run is the same in the
    other to the bit. Runs that moved nothing are refused.
    """
    assert start.keys() == one.keys() == two.keys()
    moved = {name: _norm(one[name], start[name]) for name in one}
    apart = {name: _norm(two[name], one[name]) for name in one}
    total = _norm(list(moved.values()), 0)
    assert total > LEAST * _norm([_norm(one[name], 0) for name in one], 0), "nothing was trained"
    assert _norm(list(apart.values()), 0) <= WEIGHTS * total
    for name, by in moved.items():
        assert apart[name] <= TENSOR * by, f"{name}: {apart[name]:.2g} apart, moved by {by:.2g}"


def assert_losses_alike(one: NDArray[Any], two: NDArray[Any]) -> None:
    """Refuse losses that are further apart than a small part of what they fell or rose by.

    By epochs; an epoch without a loss has none in both. Losses that are all the same are refused.
    """
    there = ~np.isnan(one)
    assert there.tolist() == (~np.isnan(two)).tolist()
    span = float(np.ptp(one[there]))
    assert span > 0, "the loss stayed where it was"
    assert np.abs(two[there] - one[there]).max() <= LOSS * span


def _norm(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)))
