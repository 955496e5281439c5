"""Show which devices this machine has, which is used and why, if it computes correctly, how fast.

    python -m pipeline machine

It changes nothing and needs no earlier run. Exit codes: 0 all is well, 1 the device computes
wrongly or an environment variable is wrong.
"""

import copy
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from pipeline.advice.throughput import measure
from pipeline.commands.table import aligned
from pipeline.images.augment import Augment
from pipeline.images.shards import Facts, read_facts
from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.nets.backbone import Backbone, build
from pipeline.nets.blocks import match, trained_with
from pipeline.nets.device import ROOM, device, has_room, kernels, memory_of, no_gpu, set_up_torch
from pipeline.nets.fuse import fuse, resolved
from pipeline.nets.network import Network
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import read_params
from pipeline.stage_runtime.settings import (
    cache_bytes,
    cache_folder,
    device_asked,
    hosts,
    launcher,
    processes,
    processors,
    threads,
)

PREPARED = Path("data/prepared")
# The largest allowed relative error of outputs and gradients.
OFF = {"fp32": 1e-3, "bf16": 0.25}

Params = dict[str, Any]
Format = Literal["fp32", "bf16"]


def main() -> None:
    """Print the devices and settings, then check and time the network of params.yaml."""
    parser_of("machine", __doc__ or "").parse_args()
    with one_line_errors():
        set_up_torch()
        params = read_params(Path("params.yaml"))
        formats: list[Format] = ["fp32"]
        if resolved(params["precision"]) != "fp32":
            formats.append(resolved(params["precision"]))
        for line in aligned([*found(params), *work(), *room(params)]):
            say(line)
        wrong = [form for form in formats if not told_right(params, form)]
        for line in speeds(params, formats[-1]):
            say(line)
        if wrong:
            sys.exit(
                f"error: networks compute wrongly here in {' and '.join(wrong)}; set "
                "PIPELINE_DEVICE=cpu or precision: fp32, and report it to PyTorch's maintainers"
            )


def found(params: Params) -> list[tuple[str, str, str]]:
    """Return the device and the number format that are used: what, which, why."""
    where = device()
    if where.type != "cpu":
        free, total = (n / 1e9 for n in memory_of(where))
        n = torch.accelerator.device_count()
        why = f"{free:.1f} of {total:.1f} GB free; {n} here; PIPELINE_DEVICE=cpu turns it off"
    else:
        why = "set by PIPELINE_DEVICE" if device_asked() == "cpu" else no_gpu()
    asked = params["precision"]
    if asked != "auto":
        reason = f"set in params.yaml (precision: {asked})"
    else:
        has = "supports" if resolved("auto") == "bf16" else "does not support"
        reason = f"precision: auto, and this {'processor' if where.type == 'cpu' else 'GPU'} "
        reason += f"{has} bfloat16"
    name = kernels() if where.type != "cpu" else f"processor, {kernels()}"
    return [("device", name, why), ("number format", resolved(asked), reason)]


def work() -> list[tuple[str, str, str]]:
    """Return the number of threads, processes and hosts that share the work."""
    here = processors()
    of = f"{here} of {os.cpu_count()} processors may be used; PIPELINE_THREADS changes it"
    lines = [("threads", str(threads()), of)]
    if launcher():
        lines.append(("processes", launcher(), "set by PIPELINE_LAUNCHER"))
    else:
        most = hosts().most
        of = "PIPELINE_PROCESSES changes it" + (f"; on up to {most} hosts" if most > 1 else "")
        lines.append(("processes", str(processes()), of))
    return lines


def room(params: Params) -> list[tuple[str, str, str]]:
    """Return the memory and the disk space."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(cache_folder())
    lines = [
        (
            "memory",
            f"{memory.total / 1e9:.0f} GB",
            f"{memory.available / 1e9:.0f} GB free",
        ),
        (
            "cache",
            f"{cache_bytes() / 1e9:g} GB",
            f"in {cache_folder()}, with {disk.free / 1e9:.0f} GB free there; PIPELINE_CACHE and "
            "PIPELINE_CACHE_GB change it",
        ),
    ]
    if (PREPARED / "facts.json").exists():
        facts, size = read_facts(PREPARED), packed_bytes(PREPARED)
        n = len((PREPARED / "index.csv").read_text(encoding="utf-8").splitlines()) - 1
        lines.append(
            (
                "images",
                f"{n:,}",
                f"{size / 1e9:.2f} GB as {facts.storage}, {_where_kept(facts, n)}",
            )
        )
    return lines


def _where_kept(facts: Facts, n: int) -> str:
    if device().type == "cpu":
        return "read from disk; the system caches in memory what fits"
    if has_room(n * int(np.prod(facts.shape)), device()):
        return f"kept on the GPU: they fit into {100 * ROOM:.0f} % of its free memory"
    return f"sent to the GPU in batches: they don't fit into {100 * ROOM:.0f} % of its free memory"


def packed_bytes(prepared: Path) -> int:
    """Return the total size of the packed images."""
    return sum(file.stat().st_size for file in (prepared / "images").iterdir())


def told_right(params: Params, form: Format) -> bool:
    """Compare outputs and gradients of the network with PyTorch's in float64; print the error."""
    torch.manual_seed(0)
    plain = build(params["backbone"]["name"], 10).eval()
    ours = fuse(copy.deepcopy(plain), form).to(device())
    x = torch.randn(4, 3, 64, 64)
    expected = gradients(plain.double(), x.double())
    off = 0.0
    for one, other in zip(gradients(ours, x.to(device())), expected, strict=True):
        off = max(off, float((one.cpu().double() - other).norm() / other.norm().clamp(min=1e-12)))
    right = off <= OFF[form]
    limit = "" if right else f", more than {OFF[form]:g}"
    say(f"{form}: outputs and gradients differ by {off:.1g} from float64's{limit}")
    return right


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return a network's outputs, and all gradients of the sum of their squares as one tensor."""
    y = model(x)
    y.square().sum().backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [y.detach(), torch.cat(found)]


def speeds(params: Params, form: Format) -> list[str]:
    """Time forward passes and training steps on random images."""
    name, size = params["backbone"]["name"], params["prepare"]["size"]
    sizes = params["stage1"]["image_size"], params["stage2"]["image_size"]
    model = fuse(build(name, 10), form)
    backbone = Backbone(name, "none", "", (0.5,) * 3, (0.5,) * 3, 0)
    network = Network(model, backbone, ["a"] * 10, size, size, "squash", 3, form).on(device())
    trained = trained_with(model, match(model, params["stage1"]["unfreeze"], "stage1.unfreeze"))
    pixels = np.random.default_rng(0).integers(0, 256, (64, size, size, 3)).astype(np.uint8)
    how = Augment(params["flips"], params["augment"]["crop"], params["augment"]["light"])
    pace = measure(network, trained, pixels, sizes, params["stage2"]["batch_size"], how)
    return [
        f"forward at {sizes[0]} px: {1 / pace.first:.0f} images/s",
        f"stage 1's trained part at {sizes[0]} px: {1 / pace.top:.0f} images/s",
        f"stage 2's steps at {sizes[1]} px: {1 / pace.step:.0f} images/s",
    ]
