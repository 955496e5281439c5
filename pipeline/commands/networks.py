"""Networks: which architectures of timm and torchvision can be a backbone, and why others can't.

python -m pipeline networks                # how many, and those that can't, with the reason
python -m pipeline networks 'timm/vit_*'   # each one that matches: the input size that `auto` means

Each is built and run on PyTorch's meta device, which computes shapes and no numbers. All of them
take some forty minutes on two processors.
"""

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from pipeline.commands.table import aligned
from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.nets.automatic import STAGE_1_AT, STAGE_2_AT, input_size, top_blocks
from pipeline.nets.backbone import head_name, names, skeleton
from pipeline.nets.blocks import depths, evaluating, run_on_zeros, traced_size
from pipeline.stage_runtime.errors import ParamError, PipelineError, one_line, suggest
from pipeline.stage_runtime.progress import say, track
from pipeline.stage_runtime.settings import threads

LARGEST = 2048  # pixels, of packed images
MANY = 16  # from this number of networks on, each processor builds some


@dataclass(frozen=True)
class Examined:
    """One architecture."""

    name: str
    refused: str = ""  # why it can't be used; empty if it can
    sizes: tuple[int, ...] = ()  # of the input in extract and in stages 1 and 2, in pixels
    unfreeze: tuple[str, ...] = ()


def examined(name: str) -> Examined:
    """Build a network without its numbers, and find out whether each stage could use it."""
    try:
        model = skeleton(name)
        _refuse_other_outputs(model)
        if not depths(model):
            return Examined(name, "no block returns feature maps or tokens")
        shares = (1.0, STAGE_1_AT, STAGE_2_AT)
        sizes = tuple(input_size(model, "auto", LARGEST, share) for share in shares)
        return Examined(name, "", sizes, tuple(top_blocks(model)))
    except PipelineError as error:
        return Examined(name, one_line(error, 160))
    except Exception as error:  # of a network that can't be built
        return Examined(name, f"{type(error).__name__}: {one_line(error, 120)}")


def _refuse_other_outputs(model: nn.Module) -> None:
    """Raise ValueError unless the head's output is the network's."""
    outputs: list[Tensor] = []
    head = model.get_submodule(head_name(model))
    handle = head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        with evaluating(model):
            found = run_on_zeros(model, traced_size(model))
    finally:
        handle.remove()
    if not outputs or found is not outputs[-1]:
        raise ValueError("its output is not that of its last linear layer")


def all_examined(pattern: str) -> Iterator[Examined]:
    """Examine the networks whose names match a shell pattern."""
    known = names()
    chosen = [name for name in known if fnmatchcase(name, pattern)]
    if not chosen:
        raise ParamError(f"no architecture is called {pattern!r}; {suggest(pattern, known)}")
    if len(chosen) < MANY:
        yield from track(map(examined, chosen), len(chosen), "networks", summary=False)
        return
    with ProcessPoolExecutor(threads(), multiprocessing.get_context("spawn")) as pool:
        yield from track(pool.map(examined, chosen), len(chosen), "networks", summary=False)


def main() -> None:
    """Run from the command line."""
    parser = parser_of("networks", __doc__ or "")
    parser.add_argument("pattern", nargs="?", default="*", help="a name, or a shell pattern")
    options = parser.parse_args()
    with one_line_errors():
        found = list(all_examined(options.pattern))
        shown = [one for one in found if one.refused or options.pattern != "*"]
        for line in aligned([_cells(one) for one in shown]):
            say(line)
        of = Counter(one.name.partition("/")[0] for one in found)
        usable = Counter(one.name.partition("/")[0] for one in found if not one.refused)
        for library, n in of.items():
            say(f"{library}: {usable[library]} of {n} architectures can be used")


def _cells(one: Examined) -> tuple[str, ...]:
    if one.refused:
        return (one.name, f"refused: {one.refused}")
    codes, first, second = one.sizes
    blocks = f"{one.unfreeze[0]} to {one.unfreeze[-1]}" if one.unfreeze else "the head alone"
    return (one.name, f"{codes} px, stage 1 at {first} and stage 2 at {second}: {blocks}")
