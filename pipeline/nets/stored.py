"""The trunk's outputs on disk, so that the frozen part runs once and not once an epoch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.nets.network import EVAL_BATCH, batches
from pipeline.progress import say, track
from pipeline.runtime import cache_bytes

Rows = NDArray[np.int64]
Batch = Callable[[int, Rows], Tensor]  # (epoch from 1, rows) -> (B, ...)


def stored(compute: Batch, n: int, views: int, file: Path, name: str) -> Batch:
    """Compute a function of (view, row) once for all rows and views, and read it from disk after.

    Epochs take turns with the views. What doesn't fit into the cache is computed when it is asked
    for, with the same result.
    """

    def view_of(epoch: int) -> int:
        return (epoch - 1) % views

    sample = compute(1, np.zeros(EVAL_BATCH, np.int64))
    channels_last = (
        sample.ndim == 4
    )  # (B, D, h, w) is kept as (B, h, w, D), as convolutions like it
    shape = sample.permute(0, 2, 3, 1).shape[1:] if channels_last else sample.shape[1:]
    total = views * n * shape.numel()
    if total * sample.element_size() > cache_bytes():
        say(f"{name}: {total * sample.element_size() / 1e9:.1f} GB don't fit into the cache")
        return lambda epoch, rows: torch.cat(
            [
                compute(view_of(epoch) + 1, rows[np.minimum(part, len(rows) - 1)])
                for part in batches(len(rows))
            ]
        )[: len(rows)]

    kept = torch.from_file(str(file), shared=True, size=total, dtype=sample.dtype)
    kept = kept.view(views, n, *shape)
    tasks = [(view, rows) for view in range(views) for rows in batches(n)]
    for view, rows in track(tasks, n * views, name, width=lambda task: len(set(task[1]))):
        z = compute(view + 1, rows)
        real = n - rows[0] if rows[0] + EVAL_BATCH > n else EVAL_BATCH
        z = z.permute(0, 2, 3, 1) if channels_last else z
        kept[view, rows[0] : rows[0] + real] = z[:real]

    def read(epoch: int, rows: Rows) -> Tensor:
        z = kept[view_of(epoch), torch.from_numpy(rows)]
        return z.permute(0, 3, 1, 2) if channels_last else z

    return read
