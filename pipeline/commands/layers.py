"""Layers: the modules that stage1.unfreeze and extract.depths can name, with size and compute.

python -m pipeline layers                          # of the network in params.yaml
python -m pipeline layers torchvision/resnet18
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pipeline.commands.table import aligned
from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.nets.automatic import compute_shares
from pipeline.nets.backbone import SOURCE_CLASSES, build, head_name
from pipeline.nets.blocks import chain, depths, is_inside, trace
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import read_params


@dataclass(frozen=True)
class Layer:
    """One module of a network."""

    name: str
    shape: tuple[int, ...]  # of its output for one image: (D, h, w) or (D,); () if it has several
    parameters: int
    share: float  # of the network's multiplications
    is_depth: bool  # the probe uses its codes if extract.depths is auto


def layers(model: nn.Module, image_size: int, all_modules: bool = False) -> list[Layer]:
    """List a network's blocks that hold parameters, in the order they run, or all such modules.

    Raises ParamError for a network that can't take images of that size.
    """
    shapes = {call.name: call.shape[1:] for call in trace(model, image_size)}
    chosen, blocks = depths(model), chain(model)
    names = [n for n in shapes if (n in blocks or all_modules) and _size(model, n)]
    shares = compute_shares(model, image_size)
    return [Layer(n, shapes[n], _size(model, n), shares.get(n, 0.0), n in chosen) for n in names]


def _size(model: nn.Module, name: str) -> int:
    return sum(p.numel() for p in model.get_submodule(name).parameters())


def as_table(found: Sequence[Layer], head: str) -> list[str]:
    """Return a table of the layers, with the cost of training from each of them on.

    `from here on` is the share of compute from a layer to the head, which stage 1 repeats in each
    epoch if this layer is the lowest unfrozen one.
    """
    rows = [("module", "output", "parameters", "compute", "from here on", "")]
    left = 1.0
    tops = {n.name for n in found if not any(is_inside(n.name, o.name) for o in found if o != n)}
    for layer in found:
        shape = " x ".join(map(str, layer.shape))
        marks = ["depth"] if layer.is_depth else []
        marks += ["head, always trains"] if is_inside(head, layer.name) else []
        above = f"{left:.1%}" if layer.name in tops else ""
        cells = (f"{layer.parameters:,}", f"{layer.share:.1%}", above, ", ".join(marks))
        rows.append((layer.name, shape, *cells))
        left -= layer.share if layer.name in tops else 0
    return aligned(rows, right=(2, 3, 4))


def main() -> None:
    """Run from the command line."""
    parser = parser_of("layers", __doc__ or "")
    parser.add_argument("name", nargs="?", metavar="NAME", help="timm/NAME or torchvision/NAME")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels (default: 224)")
    parser.add_argument("--all", action="store_true", help="also the modules inside the blocks")
    options = parser.parse_args()
    with one_line_errors():
        name = options.name or read_params(Path("params.yaml"))["backbone"]["name"]
        model = build(name, SOURCE_CLASSES).requires_grad_(False)
        for line in as_table(layers(model, options.size, options.all), head_name(model)):
            say(line)
        say('shell patterns work too, as in stage1.unfreeze: ["blocks.[56]", conv_head]')
