"""Run images through a network in inference mode, in batches of one size."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.nets.device import device
from pipeline.nets.device_images import DeviceImages
from pipeline.nets.network import Network
from pipeline.stage_runtime.distributed import Arrays, all_gather_batches
from pipeline.stage_runtime.files import Rowwise

# One size, as the batch size may change the last bits of an output; the place in a batch doesn't.
EVAL_BATCH, ON_A_GPU = 32, 256


def eval_batch() -> int:
    """Return the batch size for inference."""
    return EVAL_BATCH if device().type == "cpu" else ON_A_GPU


def in_batches(
    n: int, compute: Callable[[NDArray[np.int64]], Arrays], first: int = 0
) -> Iterator[Arrays]:
    """Yield a function's outputs for rows `first` to n - 1, in batches of one size.

    The last batch is filled up with row n - 1; the extra outputs are dropped. The processes of a
    stage share the batches.
    """
    size = eval_batch()

    def batch(i: int) -> NDArray[np.int64]:
        return np.minimum(np.arange(first + i * size, first + (i + 1) * size), n - 1)

    for i, parts in enumerate(
        all_gather_batches(-(-(n - first) // size), lambda i: compute(batch(i)))
    ):
        yield [part[: n - first - i * size] for part in parts]


def run_in_batches(
    images: Rowwise, network: Network, run: Callable[[Tensor], Sequence[Tensor]], first: int = 0
) -> Iterator[Arrays]:
    """Run a function on images (N, H, W[, 3]) from the `first` on, in inference mode.

    The images are on the network's device. Yields the function's float32 outputs for each batch.
    """
    feed = DeviceImages(images, network.device)

    def outputs(rows: NDArray[np.int64]) -> Arrays:
        with torch.inference_mode():
            return [output.float().cpu().numpy() for output in run(feed(rows))]

    return in_batches(len(images), outputs, first)
