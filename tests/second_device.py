"""A second device that isn't there: tensors that compute on the processor, but belong elsewhere.

They mix with the processor's as a GPU's do, which is not at all, can't become NumPy arrays, and
what is made on their device is one of them. So code that forgets to bring something over fails.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")  # a device that PyTorch knows everywhere, and the project doesn't use


class Elsewhere(torch.Tensor):
    """A tensor of the second device; `held` is what it computes with."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Elsewhere":
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on what is held, if all its tensors are on one device."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, Elsewhere)]
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.ndim]
    target = kwargs.get("device")
    copies = func is torch.ops.aten.copy_.default or func is torch.ops.aten._to_copy.default
    if there and here and not copies:
        raise RuntimeError(f"{func}: tensors on two devices, {DEVICE} and {here[0].device}")
    kwargs = {**kwargs, "device": torch.device("cpu")} if target is not None else kwargs
    held = tree_map(lambda t: t.held if isinstance(t, Elsewhere) else t, (args, kwargs))
    found = func(*held[0], **held[1])
    if func is torch.ops.aten.copy_.default:
        return args[0]
    stays = bool(there) if target is None else torch.device(target) == DEVICE
    own = {id(t.held): t for t in there}  # operations in place give what they were given

    def wrapped(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or not stays:
            return t
        return own[id(t)] if id(t) in own else Elsewhere(t)

    return tree_map(wrapped, found)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if target is not None and torch.device(target) == DEVICE:
            return run(func, args, kwargs)
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # It makes its tensor out of sight of operations.
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        # A wrapper can't be a view in inference mode, as a real device's tensor can.
        if func is torch.Tensor.detach and isinstance(args[0], Elsewhere):
            with torch.inference_mode(False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[None]:
    """Within this, what is made on the device is made there."""
    with _Operations(), _Functions():
        yield
