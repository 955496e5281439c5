"""Near duplicates: images that are equal except for size, compression or brightness."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

from pipeline.dataset.split import components
from pipeline.stage_runtime.files import Rowwise

SIDE = 32  # side of the compared thumbnails, in pixels
# Of 16 bits each: hashes that differ in at most 7 bits differ in at most one bit in some band.
BANDS = 4
MOST_BITS = 7
LEAST_CORRELATION = 0.99  # between the thumbnails of images whose hashes are close
BATCH = 128
AT_ONCE = 100_000  # pairs of hashes held in memory

Pairs = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]


def clusters(images: Rowwise, hashes: Hashes) -> NDArray[np.int64]:
    """Return each image's cluster of near duplicates, a number; -1 if it has none.

    Two images (N, H, W[, 3]) are in one cluster if a chain of near duplicates links them. The
    hashes are (N,).
    """
    pairs = near_duplicates(images, hashes)
    numbers = components(pairs[:, 0], pairs[:, 1], len(images))
    return np.where(np.bincount(numbers, minlength=1)[numbers] > 1, numbers, -1)


def near_duplicates(images: Rowwise, hashes: Hashes) -> Pairs:
    """Return the pairs of near duplicates among images (N, H, W[, 3]): (P, 2), each pair once.

    Candidates have perceptual hashes (N,) that differ in at most 7 of 64 bits; they are kept if
    their grey thumbnails correlate. This finds images of another size, compression or brightness,
    but not crops. If many images have the same hash, each is compared with the first.
    """
    _, first, of = np.unique(hashes, return_index=True, return_inverse=True)
    pairs = [np.stack([first[of], np.arange(len(hashes))], 1)]  # equal hashes, by their first
    unique = hashes[first]
    pairs += [first[found] for found in _close(unique)]
    candidates = np.concatenate(pairs)
    candidates = candidates[candidates[:, 0] != candidates[:, 1]]
    candidates = np.unique(np.sort(candidates, 1), axis=0)
    kept = [
        chunk[_correlations(images, chunk) >= LEAST_CORRELATION]
        for chunk in np.array_split(candidates, len(candidates) // BATCH + 1)
    ]
    return np.concatenate(kept).astype(np.int64)


def _close(hashes: NDArray[np.uint64]) -> Iterator[Pairs]:
    """Yield pairs of positions whose hashes, all different, differ in at most MOST_BITS.

    Some pairs occur more than once. Source: Norouzi et al. 2012, Fast Search in Hamming Space with
    Multi-Index Hashing.
    """
    for band in range(BANDS):
        keys = (hashes >> np.uint64(16 * band)).astype(np.uint16).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.searchsorted(keys, np.arange(2**16 + 1))
        for flip in (0, *(1 << bit for bit in range(16))):
            # The partners of the hash at a place are those from `first` to `end`, each pair once.
            first = starts[keys ^ flip] if flip else np.arange(1, len(keys) + 1)
            end = np.where(keys & flip, first, starts[(keys ^ flip) + 1])
            for place, partner in _ranges(first, end - first):
                differing = np.bitwise_count(hashes[order[place]] ^ hashes[order[partner]])
                close = differing <= MOST_BITS
                if close.any():
                    yield np.stack([order[place[close]], order[partner[close]]], 1)


def _ranges(first: Places, counts: Places) -> Iterator[tuple[Places, Places]]:
    """Yield each place with each of its `counts` numbers from `first` on, many at a time."""
    upto = counts.cumsum()
    parts = np.searchsorted(upto, np.arange(AT_ONCE, upto[-1] if len(upto) else 0, AT_ONCE))
    for places in np.split(np.arange(len(counts)), np.unique(parts)):
        n = counts[places]
        place = np.repeat(places, n)
        yield place, first[place] + np.arange(len(place)) - np.repeat(n.cumsum() - n, n)


def _thumbnails(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Shrink images (N, H, W[, 3]) to grey (N, 32, 32)."""
    small = [
        Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        for image in images
    ]
    return np.stack([np.asarray(image, np.float32) for image in small])


def hashes_of(images: NDArray[np.uint8]) -> Hashes:
    """Return perceptual hashes of images (N, H, W[, 3]): low frequencies against their median.

    Source: Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash Functions.
    """
    low = dctn(_thumbnails(images), axes=(1, 2))[:, :8, :8].reshape(len(images), 64)
    # The first is the mean brightness, which is left out of the median.
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _correlations(images: Rowwise, pairs: Pairs) -> NDArray[np.float64]:
    if not len(pairs):
        return np.empty(0)
    a, b = (_thumbnails(images[pairs[:, side]]).reshape(len(pairs), -1) for side in (0, 1))
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    # Flat images have no correlation; they are never near duplicates here.
    return np.asarray(np.where(scale > 0, (a * b).sum(1) / np.maximum(scale, 1e-12), 0.0))
