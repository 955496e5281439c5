"""Near duplicates: pictures that are the same but for size, compression or a touch of light."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.files import Rowwise

SIDE = 32  # pixels a side of the thumbnails that are compared
BANDS = 8  # 8 bits each: hashes that differ in at most 7 bits agree in one of them
MOST_BITS = 7
LEAST_CORRELATION = 0.99  # between thumbnails, once the hashes are as close as that
BATCH = 128

Pairs = NDArray[np.int64]
Hashes = NDArray[np.uint64]


def clusters_alike(images: Rowwise, hashes: Hashes) -> NDArray[np.int64]:
    """Number the cluster of near duplicates of each image (N, H, W[, 3]); -1 for one on its own.

    Two are in one cluster if a chain of near duplicates links them. The hashes are (N,).
    """
    pairs, n = near_duplicates(images, hashes), len(images)
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    clusters = connected_components(graph, directed=False)[1]
    return np.where(np.bincount(clusters, minlength=1)[clusters] > 1, clusters, -1)


def near_duplicates(images: Rowwise, hashes: Hashes) -> Pairs:
    """Find pairs of images (N, H, W[, 3]) that show the same: (P, 2), each pair once.

    Candidates have perceptual hashes (N,) that differ in at most 7 of 64 bits; they are kept if
    their grey thumbnails correlate. That finds other sizes, compressions and brightnesses of one
    picture, no cut-outs of it. Of many images with one hash each is compared with the first.
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
    """Yield pairs of positions whose hashes, all different, differ in at most MOST_BITS."""
    for band in range(BANDS):
        key = (hashes >> np.uint64(8 * band)) & np.uint64(0xFF)
        order = np.argsort(key, kind="stable")
        ends = np.flatnonzero(np.diff(key[order])) + 1
        for group in np.split(order, ends):
            # A row at a time: a band shared by many needs no square of them in memory.
            for i, position in enumerate(group[:-1]):
                others = group[i + 1 :]
                differing = np.bitwise_count(hashes[others] ^ hashes[position])
                close = others[differing <= MOST_BITS]
                if len(close):
                    yield np.stack([np.full(len(close), position), close], 1)


def _thumbnails(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Shrink images (N, H, W[, 3]) to grey (N, 32, 32)."""
    small = [
        Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        for image in images
    ]
    return np.stack([np.asarray(image, np.float32) for image in small])


def hashes_of(images: NDArray[np.uint8]) -> Hashes:
    """Hash what images (N, H, W[, 3]) show: the signs of low frequencies around their median.

    Source: Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash Functions.
    """
    low = dctn(_thumbnails(images), axes=(1, 2))[:, :8, :8].reshape(len(images), 64)
    # The first is the mean brightness, which says nothing.
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _correlations(images: Rowwise, pairs: Pairs) -> NDArray[np.float64]:
    if not len(pairs):
        return np.empty(0)
    a, b = (_thumbnails(images[pairs[:, side]]).reshape(len(pairs), -1) for side in (0, 1))
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    # Two flat pictures are alike if they are equally bright, which is not said here.
    return np.asarray(np.where(scale > 0, (a * b).sum(1) / np.maximum(scale, 1e-12), 0.0))
