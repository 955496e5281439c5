"""The structure of a network, found by running it once: its chain of blocks, and their names."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pipeline.nets.backbone import head_name
from pipeline.nets.device import device_of
from pipeline.nets.tokens import layout_of
from pipeline.stage_runtime.errors import (
    NetworkError,
    ParamError,
    PipelineError,
    is_out_of_memory,
    one_line,
    suggest,
)

TRACE_SIZE = 96  # pixels; enough for five halvings
USUAL_SIZES = (224, 256, 299, 336, 384, 448, 512)  # of networks with a fixed input size


@dataclass
class Call:
    """One call of a module in a forward pass, with the order of its start and of its end."""

    name: str
    start: int
    end: int = -1
    shape: tuple[int, ...] = ()  # of its output, if that is one tensor


_traced: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def traced_size(model: nn.Module) -> int:
    """Return the image size at which a network is traced: TRACE_SIZE, or the one it was made for.

    Raises NetworkError if the network fails at every usual size.
    """
    if model not in _traced:
        for size in (TRACE_SIZE, *made_for(model), *USUAL_SIZES):
            if fails_at(model, size) is None:
                _traced[model] = size
                return size
        trace(model, TRACE_SIZE)  # its error names what fails
    return _traced[model]


def made_for(model: nn.Module) -> list[int]:
    """Return the image size that a network's own configuration names, if there is one."""
    config = getattr(model, "pretrained_cfg", None) or {}
    named = [(config.get("input_size") or [None])[-1], getattr(model, "image_size", None)]
    return [size for size in named if isinstance(size, int)]


def fails_at(model: nn.Module, size: int) -> Exception | None:
    """Return the error with which a network fails at an image size, or None if it runs."""
    try:
        with evaluating(model):
            run_on_zeros(model, size)
    except Exception as error:
        if isinstance(error, PipelineError) or is_out_of_memory(error):
            raise  # its message is clear
        return error
    return None


def trace(model: nn.Module, size: int | None = None) -> list[Call]:
    """Run a network once on zeros and return the calls of its modules, in order of their start.

    The images have `size` pixels a side, by default those of `traced_size`.

    Raises ParamError if the network fails at this size but runs at another one, and NetworkError if
    it fails at every usual size.
    """
    size = size or traced_size(model)
    calls: list[Call] = []
    open_calls: list[Call] = []
    clock = iter(range(10**9))

    def before(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            open_calls.append(Call(name, next(clock)))
            calls.append(open_calls[-1])

        return hook

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        call = open_calls.pop()
        call.end = next(clock)
        call.shape = tuple(output.shape) if isinstance(output, Tensor) else ()

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(before(name)))
            handles.append(module.register_forward_hook(after))
    try:
        error = fails_at(model, size)
        if error is not None:
            raise _named(model, size, error) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode, and restore the modes of its modules afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def run_on_zeros(model: nn.Module, size: int) -> Any:
    """Run a network on two images of zeros, of `size` pixels a side; return its output."""
    with torch.inference_mode():
        return model(torch.zeros(2, 3, size, size, device=device_of(model)))


def _named(model: nn.Module, size: int, error: Exception) -> PipelineError:
    """Return an error that names the cause: the size, if the network runs at another one."""
    name, said = type(model).__name__, one_line(error)
    for other in (*made_for(model), *USUAL_SIZES):
        if other != size and fails_at(model, other) is None:
            return ParamError(
                f"backbone.name: {name} can't take images of {size} px ({said}); {other} px works"
            )
    said = f"{type(error).__name__}: {said}"
    return NetworkError(
        f"{name} fails in its forward pass at every usual image size ({said}); set "
        "PIPELINE_DEBUG=1 to see where"
    )


def chain(model: nn.Module) -> list[str]:
    """Return the network's blocks in running order, from the stem to the head.

    These are its direct children. A child with several stages (its own children have three or more
    sizes of feature maps) is replaced by its children, and so is one that holds the blocks of a
    transformer.
    """
    return _chain(model, trace(model))


def _chain(model: nn.Module, calls: Sequence[Call]) -> list[str]:
    def inside(call: Call) -> list[str]:
        children = _directly_in(calls, call)
        sizes = {c.shape[-2:] for c in children if len(c.shape) == 4}
        if len(sizes) >= 3:
            return [c.name for c in children]
        if _holds_blocks(model, calls, call):
            return [name for child in children for name in inside(child)]
        return [call.name]

    names = [name for call in _directly_in(calls, None) for name in inside(call)]
    return list(dict.fromkeys(names))


def _holds_blocks(model: nn.Module, calls: Sequence[Call], call: Call) -> bool:
    """Return whether a call runs a row of blocks on tokens, directly or within another module."""
    children = _directly_in(calls, call)
    blocks = Counter(
        type(model.get_submodule(child.name))
        for child in children
        if len(child.shape) == 3 and any(model.get_submodule(child.name).children())
    )
    if max(blocks.values(), default=0) >= 3:
        return True
    tokens = [child for child in children if len(child.shape) == 3]
    return any(_holds_blocks(model, calls, child) for child in tokens)


def layer_groups(model: nn.Module) -> list[list[str]]:
    """Group the chain for layer decay, from the stem to the head.

    Only blocks with parameters count. A block without a convolution or linear layer, such as a
    BatchNorm, belongs to the block before it.
    """
    groups: list[list[str]] = []
    for name in chain(model):
        sides = [p.shape for p in model.get_submodule(name).parameters()]
        if not sides:
            continue
        # A normalisation or a PReLU has one number per channel; a layer's weights have two or more
        # dimensions.
        is_layer = any(sum(side > 1 for side in shape) > 1 for shape in sides)
        if is_layer or not groups:
            groups.append([name])
        else:
            groups[-1].append(name)
    return groups


def _directly_in(calls: Sequence[Call], outer: Call | None) -> list[Call]:
    """Return the calls made directly within a call (None: within the network)."""
    within = [c for c in calls if outer is None or outer.start < c.start < outer.end]
    direct: list[Call] = []
    for call in within:
        if not direct or call.start > direct[-1].end:
            direct.append(call)
    return direct


def depths(model: nn.Module, most: int = 8) -> list[str]:
    """Choose at most `most` evenly spread blocks of the chain, whose pooled outputs become codes.

    A block must contain layers and return tokens, or feature maps of at most a quarter of the
    image's side. Single layers are chosen only if there are no other blocks. Larger maps carry
    little information and take longest to pool. The last codes (the head's input) are not listed.
    """
    maps = with_maps(model)
    blocks = [
        name
        for name in maps
        if any(
            isinstance(m, nn.Conv2d | nn.Linear)
            for m in list(model.get_submodule(name).modules())[1:]
        )
    ]
    found = blocks or maps
    if len(found) <= most:
        return found
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]


def with_maps(model: nn.Module) -> list[str]:
    """Return the blocks of the chain that return feature maps or tokens, in running order."""
    calls = trace(model)
    shapes = {call.name: call.shape for call in calls}
    largest = traced_size(model) // 4
    return [
        name
        for name in _chain(model, calls)
        if (layout := layout_of(shapes[name])) and 1 < layout.side <= largest
    ]


def match(model: nn.Module, patterns: Sequence[str], key: str) -> list[str]:
    """Return the modules that names or shell patterns select, except those inside another one.

    Raises ParamError if a pattern selects nothing, with similar names.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise ParamError(f"{key}: no module is called {pattern!r}; {suggest(pattern, names)}")
        found += hits
    kept = set(found)
    return [n for n in names if n in kept and not any(is_inside(n, k) for k in kept if k != n)]


def is_inside(name: str, module: str) -> bool:
    """Return whether `name` is a module or tensor inside `module`, or that module itself."""
    return name == module or name.startswith(f"{module}.")


def trained_with(model: nn.Module, unfreeze: Sequence[str]) -> list[str]:
    """Return the modules that train: the unfrozen ones and the head."""
    head = head_name(model)
    return [*(name for name in unfreeze if not is_inside(head, name)), head]
