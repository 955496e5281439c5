"""The processes that share a stage's work, and what they do together.

There is one, but with PIPELINE_PROCESSES, or where torchrun or Kubernetes start several: then each
runs the same stage, on its part of every batch, and all come to the same numbers. Only the first
writes. Every function here is called by all of them, in the same order.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.runtime import patience, rank, team_size

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
Parts = Sequence[NDArray[Any]]


class TeamError(PipelineError):
    """Another process of the same stage is gone, or can't be reached."""


@contextmanager
def together() -> Iterator[None]:
    """Meet the other processes, and part once all are done."""
    from datetime import timedelta

    import torch.distributed as dist

    if os.environ.get("MASTER_ADDR") in ("localhost", "127.0.0.1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever this machine's name leads to
    dist.init_process_group("gloo", timeout=timedelta(seconds=patience()))
    try:
        yield
        dist.barrier()
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        said = " ".join(str(error).split())[:120]
        raise TeamError(
            f"process {rank()} lost the others that share this stage ({said})"
        ) from None
    dist.destroy_process_group()


def wait() -> None:
    """Wait until all are here: what the first wrote before is there for all after."""
    if team_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def agree(value: T) -> T:
    """Give all what the first one says."""
    if team_size() == 1:
        return value
    import torch.distributed as dist

    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def spread(n: int, compute: Callable[[int], Parts]) -> Iterator[Parts]:
    """Yield compute(0), ..., compute(n - 1) in order to all, each computed by one of them.

    All have the same shapes and types.
    """
    size = team_size()
    if size == 1:
        yield from map(compute, range(n))
        return
    import torch
    import torch.distributed as dist

    for first in range(0, n, size):
        own = [np.ascontiguousarray(part) for part in compute(min(first + rank(), n - 1))]
        found = []
        for part in own:
            bits = torch.from_numpy(part.reshape(-1).view(np.uint8))
            every = torch.empty((size, part.nbytes), dtype=torch.uint8)
            dist.all_gather(list(every), bits)
            found.append(every.numpy().view(part.dtype).reshape(size, *part.shape))
        for i in range(min(size, n - first)):
            yield [part[i] for part in found]


def own_part(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give this process's part of a batch."""
    return rows[rank() :: team_size()]


def add_up(model: "nn.Module", *numbers: float) -> list[float]:
    """Add up the gradients of all processes, and these numbers, whose sums it gives.

    One message: what each parameter's gradient is on the whole batch, if the loss was divided by
    its size.
    """
    if team_size() == 1:
        return list(numbers)
    import torch
    import torch.distributed as dist

    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    message = torch.cat([*(g.flatten() for g in gradients), torch.tensor(numbers)])
    dist.all_reduce(message)
    begin = 0
    for parameter, gradient in zip(trained, gradients, strict=True):
        # In the gradient's own layout, which the optimiser's fused kernels rely on.
        gradient.copy_(message[begin : begin + gradient.numel()].view(gradient.shape))
        parameter.grad = gradient
        begin += gradient.numel()
    return [float(value) for value in message[begin:]]
