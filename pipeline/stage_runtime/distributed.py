"""The process group that shares a stage's work, and its collective operations.

By default there is one process. PIPELINE_PROCESSES, torchrun or Kubernetes start several: each runs
the same stage on its shard of every batch, and all compute the same results. Only the first one
writes. Every function here is called by all processes, in the same order.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.stage_runtime.errors import ProcessGroupError
from pipeline.stage_runtime.settings import collective_timeout, device_asked, rank, world_size

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
Arrays = Sequence[NDArray[Any]]


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group, and leave it once all processes are done.

    Raises ProcessGroupError if another process is gone or doesn't answer.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    # Gloo's default is the interface of the host name, which other hosts often can't reach.
    interface = interface_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
    try:
        # NCCL for gradients on GPUs, with an error if a process is lost; Gloo for everything else.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        on_gpus = torch.cuda.is_available() and device_asked() != "cpu"
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=collective_timeout()))
        yield
        barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if "gloo" not in said and not isinstance(error, dist.DistError):
            raise
        raise ProcessGroupError(
            f"process {rank()} lost the other processes of this stage ({said[:120]})"
        ) from None


def address_towards(host: str, port: int) -> str:
    """Return the address from which this machine reaches another.

    Raises ProcessGroupError if there is no route to it.
    """
    try:
        family, _, _, _, there = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect(there)  # sends nothing
            return str(way.getsockname()[0])
    except OSError as error:
        raise ProcessGroupError(f"{host}: can't be reached ({error.strerror})") from None


def interface_towards(host: str, port: int) -> str:
    """Return the network interface through which this machine reaches another."""
    import psutil

    own = address_towards(host, port)
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            return str(name)
    return "lo"  # 127.0.0.2 and the like are not listed


def barrier() -> None:
    """Wait for all processes; afterwards all see what the first one wrote before."""
    if world_size() > 1:
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.zeros(1))  # on CPUs, even if gradients are on GPUs


def broadcast(value: T) -> T:
    """Return the first process's value in all processes; it must be valid JSON."""
    if world_size() == 1:
        return value
    import torch
    import torch.distributed as dist

    said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor(len(said))
    dist.broadcast(length, src=0)
    message = said if rank() == 0 else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(message, src=0)
    agreed: T = json.loads(message.numpy().tobytes())
    return agreed


def all_gather_batches(n: int, compute: Callable[[int], Arrays]) -> Iterator[Arrays]:
    """Yield compute(0), ..., compute(n - 1) in order in all processes; one computes each.

    All results have the same shapes and types.
    """
    size = world_size()
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


def shard(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return this process's shard of a batch."""
    return rows[rank() :: world_size()]


def all_reduce_gradients(model: "nn.Module", *numbers: float) -> list[float]:
    """Sum the gradients and the numbers over all processes; return the sums of the numbers.

    All of it is one message. The sums are the gradients of the whole batch if each process divided
    its loss by the size of the whole batch.
    """
    if world_size() == 1:
        return list(numbers)
    import torch
    import torch.distributed as dist

    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    mine = torch.tensor(numbers, device=trained[0].device)
    message = torch.cat([*(g.flatten() for g in gradients), mine])
    dist.all_reduce(message)
    begin = 0
    for parameter, gradient in zip(trained, gradients, strict=True):
        # In the gradient's own layout, which the optimiser's fused kernels rely on.
        gradient.copy_(message[begin : begin + gradient.numel()].view(gradient.shape))
        parameter.grad = gradient
        begin += gradient.numel()
    return [float(value) for value in message[begin:]]
