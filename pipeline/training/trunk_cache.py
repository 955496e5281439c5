"""Cache the trunk's outputs on disk, so that the frozen part runs once, not in each epoch or run.

The local cache has one file per view, in a folder named by a hash of everything that the outputs
depend on. This run and later ones read them from there. The entries used longest ago are deleted to
make room.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.images.augment import Augment, augment, dihedral
from pipeline.images.shards import Images
from pipeline.nets.batches import eval_batch, in_batches
from pipeline.nets.device import has_room, kernels
from pipeline.nets.device_images import DeviceImages
from pipeline.nets.network import Network
from pipeline.stage_runtime.cache_entries import hold, make_room
from pipeline.stage_runtime.distributed import Arrays, broadcast
from pipeline.stage_runtime.progress import say, track
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.settings import cache_bytes, cache_folder, rank
from pipeline.training.cut import Cut

Indices = NDArray[np.int64]
Compute = Callable[[Sequence[int], Indices], Sequence[Tensor]]  # (views, rows) -> (B, ...) per view
Batch = Callable[[int, Indices], Tensor]  # (epoch from 1, rows) -> (B, ...)
HERE = Path(__file__).parent
CODE = (
    *(HERE.parent / "nets").glob("*.py"),
    *(HERE / name for name in ("cut.py", "freeze.py", "trunk_cache.py")),
    HERE.parent / "images" / "augment.py",
)


@dataclass(frozen=True)
class TrunkOutputs:
    """What a cut network's trunk gives for views of packed images."""

    network: Network
    cut: Cut

    def augmented(
        self, images: Images, feed: DeviceImages, ids: Indices, how: Augment, views: int, seed: int
    ) -> Batch:
        """Return those of augmented images: of `views` of each, or with 0 of new ones each epoch.

        `feed` gives the images' pixels, and `ids` (N,) which random numbers are theirs.
        """

        @torch.no_grad()
        def compute(epochs: Sequence[int], rows: Indices) -> list[Tensor]:
            pixels = feed(rows)
            if how.crop == 1:  # once for all epochs: without crops, the order makes no difference
                pixels = self.network.shrink(pixels)
            views_of = (augment(pixels, ids[rows], epoch, seed, how) for epoch in epochs)
            return [self.cut.trunk(self.network.normalise(x)) for x in views_of]

        if not views:
            return lambda epoch, rows: compute([epoch], rows)[0]
        facts = {"how": asdict(how), "seed": seed, "ids": ids.tolist()}
        key = key_of(self.network, self.cut.name, images.key, **facts)
        return cached_outputs(compute, len(images), views, key, "trunk train")

    def flipped(self, images: Images, feed: DeviceImages, views: int, name: str) -> Batch:
        """Return those of whole images (view 1) and of their flips (the views after it)."""

        @torch.no_grad()
        def compute(views: Sequence[int], rows: Indices) -> list[Tensor]:
            x = self.network.normalise(feed(rows))
            return [self.cut.trunk(dihedral(x, view - 1, rows=2)) for view in views]

        key = key_of(self.network, self.cut.name, images.key)
        return cached_outputs(compute, len(images), views, key, name)


def key_of(network: Network, block: str, pixels: str, **augmentation: Any) -> str:
    """Return a hash of everything that the trunk's outputs below a block depend on.

    These are the images (as a hash), their augmentation, the network, the code, the libraries, the
    processor's kernels, and the number of threads, which changes the rounding.
    """
    facts = network.facts()
    facts.pop("classes")
    depends = {
        **facts,
        "block": block,
        "pixels": pixels,
        "augmentation": augmentation,
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(CODE)],
        "versions": [metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")],
        "kernels": kernels(),
        "threads": torch.get_num_threads(),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def cached_outputs(compute: Compute, n: int, views: int, key: str, name: str) -> Batch:
    """Compute a function of (view, row) once for all rows and views, and read it from disk after.

    Epochs cycle through the views. The results of an earlier run are reused, even if it was killed.
    Results that don't fit into the cache are computed when they are needed, with the same values.
    """

    def view_of(epoch: int) -> int:
        return (epoch - 1) % views + 1

    size = eval_batch()
    [sample] = compute([1], np.zeros(size, np.int64))
    needed = views * n * sample[0].numel() * sample.element_size()
    if needed > cache_bytes():
        say(f"{name}: {needed / 1e9:.1f} GB don't fit into the cache; computed in each epoch")

        def anew(epoch: int, rows: Indices) -> Tensor:
            # In batches of the same size as for the cache.
            whole = (np.arange(i, i + size) for i in range(0, len(rows), size))
            parts = [rows[np.minimum(part, len(rows) - 1)] for part in whole]
            found = [compute([view_of(epoch)], part)[0] for part in parts]
            return torch.cat(found)[: len(rows)]

        return anew

    # (B, D, h, w) is stored as (B, h, w, D), the layout that is fast for convolutions.
    channels_last = sample.ndim == 4
    folder = cache_folder() / "trunk" / key
    outputs = Resume(folder)
    with hold(folder, name):
        if rank() == 0:
            make_room(folder, needed)
        missing = broadcast([v for v in range(1, views + 1) if not outputs.is_filled(str(v), n)])

        def computed(rows: Indices) -> Arrays:
            found = compute(missing, rows)
            laid_out = (z.permute(0, 2, 3, 1) if channels_last else z for z in found)
            # NumPy has no bfloat16: its bits are stored as integers.
            bits = (z.view(torch.int16) if z.dtype == torch.bfloat16 else z for z in laid_out)
            return [z.cpu().numpy() for z in bits]

        def shown(first: int) -> Iterator[Arrays]:
            total = (n - first) * len(missing)
            batches = in_batches(n, computed, first)
            return track(batches, total, name, lambda part: len(part[0]) * len(missing))

        if missing:
            outputs.filled([str(view) for view in missing], n, shown)
        else:
            say(f"{name}: read from the cache")
        # Copy-on-write, as PyTorch warns about read-only arrays. Mapped files stay readable after
        # another run has deleted them.
        kept = {v: np.load(outputs.file(str(v)), mmap_mode="c") for v in range(1, views + 1)}
    by_view = {view: torch.from_numpy(array).view(sample.dtype) for view, array in kept.items()}
    if has_room(needed, sample.device):
        by_view = {view: z.to(sample.device) for view, z in by_view.items()}

    def read(epoch: int, rows: Indices) -> Tensor:
        kept_there = by_view[view_of(epoch)]
        z = kept_there[torch.from_numpy(rows).to(kept_there.device)].to(sample.device)
        return z.permute(0, 3, 1, 2) if channels_last else z

    return read
