"""The trunk's outputs on disk, so that the frozen part runs once and not once an epoch or a run.

They lie in the local cache, a file a view, named by a hash of all they depend on: whoever asks for
the same again, in this run or a later one, reads them. What is there too long makes room.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.nets.network import EVAL_BATCH, Network, batches
from pipeline.progress import say, track
from pipeline.runtime import cache_bytes, cache_folder

Rows = NDArray[np.int64]
Compute = Callable[[Sequence[int], Rows], Sequence[Tensor]]  # (views, rows) -> (B, ...) a view
Batch = Callable[[int, Rows], Tensor]  # (epoch from 1, rows) -> (B, ...)
CODE = (*Path(__file__).parent.glob("*.py"), Path(__file__).parents[1] / "images/augment.py")


def key_of(network: Network, block: str, images: NDArray[np.uint8], **augmentation: Any) -> str:
    """Name the trunk's outputs below a block by a hash of all that they depend on.

    Packed images (N, H, W[, 3]) and how they are augmented, the network, the code and the libraries
    that compute, the processor's kernels and the threads: another number of them rounds otherwise.
    """
    facts = network.facts()
    facts.pop("classes")
    depends = {
        **facts,
        "block": block,
        "pixels": hashlib.sha256(np.ascontiguousarray(images).data).hexdigest(),
        "augmentation": augmentation,
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(CODE)],
        "versions": [metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")],
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def stored(compute: Compute, n: int, views: int, key: str, name: str) -> Batch:
    """Compute a function of (view, row) once for all rows and views, and read it from disk after.

    Epochs take turns with the views. What doesn't fit into the cache is computed when it is asked
    for, with the same result.
    """

    def view_of(epoch: int) -> int:
        return (epoch - 1) % views + 1

    [sample] = compute([1], np.zeros(EVAL_BATCH, np.int64))
    # (B, D, h, w) is kept as (B, h, w, D), as convolutions like it.
    channels_last = sample.ndim == 4
    shape = sample.permute(0, 2, 3, 1).shape[1:] if channels_last else sample.shape[1:]
    size = n * shape.numel()  # numbers a view
    needed = views * size * sample.element_size()
    if needed > cache_bytes():
        say(f"{name}: {needed / 1e9:.1f} GB don't fit into the cache")
        return lambda epoch, rows: torch.cat(
            [
                compute([view_of(epoch)], rows[np.minimum(part, len(rows) - 1)])[0]
                for part in batches(len(rows))
            ]
        )[: len(rows)]

    folder = cache_folder() / "trunk"
    folder.mkdir(exist_ok=True)
    files = {view: folder / f"{key}-{view}" for view in range(1, views + 1)}
    whole = size * sample.element_size()
    missing = [
        view for view, file in files.items() if not file.exists() or file.stat().st_size != whole
    ]
    _make_room(folder, needed, list(files.values()))

    def opened(file: Path, writable: bool = False) -> Tensor:
        numbers = torch.from_file(str(file), shared=writable, size=size, dtype=sample.dtype)
        return numbers.view(n, *shape)

    def computed() -> None:
        parts = {
            view: files[view].with_name(f"{files[view].name}.{os.getpid()}.part")
            for view in missing
        }
        kept = [opened(part, writable=True) for part in parts.values()]

        def width(rows: Rows) -> int:
            return len(set(rows)) * len(missing)

        for rows in track(batches(n), n * len(missing), name, width):
            end = min(int(rows[0]) + EVAL_BATCH, n)
            for of_view, z in zip(kept, compute(missing, rows), strict=True):
                laid_out = z.permute(0, 2, 3, 1) if channels_last else z
                of_view[rows[0] : end] = laid_out[: end - rows[0]]
        for view, part in parts.items():
            part.replace(files[view])

    if missing:
        computed()
    else:
        say(f"{name}: kept from an earlier run")
    by_view = {view: opened(file) for view, file in files.items()}
    for file in files.values():
        os.utime(file)  # used now: the last to make room

    def read(epoch: int, rows: Rows) -> Tensor:
        z = by_view[view_of(epoch)][torch.from_numpy(rows)]
        return z.permute(0, 3, 1, 2) if channels_last else z

    return read


def _make_room(folder: Path, needed: int, wanted: Sequence[Path]) -> None:
    """Delete what was used longest ago until `needed` bytes fit, and what killed runs left."""
    others = {}
    for file in folder.iterdir():
        if file.suffix == ".part" and not _is_alive(int(file.suffixes[-2][1:])):
            file.unlink(missing_ok=True)
        elif file.suffix != ".part" and file not in wanted:
            others[file] = file.stat()
    kept = sum(stat.st_size for stat in others.values())
    for file in sorted(others, key=lambda f: others[f].st_mtime):
        if kept + needed <= cache_bytes():
            return
        kept -= others[file].st_size
        file.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
