"""The audit of a data set: counts, duplicates, unreadable files and unusual images."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset.decode import CLIPPED
from pipeline.dataset.layout import Item
from pipeline.dataset.pack import Packed, Survey
from pipeline.dataset.sources import Source
from pipeline.images.shards import Facts
from pipeline.images.tones import HIGHEST, LOWEST

# Above these, test images look as if they came from another source than training images.
LEAST_TO_COMPARE = 10  # images per split
SHARE_OFF = 0.5  # difference of the shares of a format, or of grey
SPREADS_OFF = 1.5  # difference of the means, in standard deviations
LEAST_OFF = 8  # difference of the means, in pixels or levels of brightness

Ints = NDArray[np.int64]


def clusters(numbers: NDArray[np.int64]) -> list[list[int]]:
    """Return a list of positions for each number that occurs twice or more; -1 is ignored."""
    order = np.argsort(numbers, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(numbers[order])) + 1, len(order))
    starts = np.append(0, ends[:-1])
    several = (ends - starts > 1) & (numbers[order[starts]] >= 0) if len(order) else []
    pairs = zip(starts[several], ends[several], strict=True)
    return sorted(order[start:end].tolist() for start, end in pairs)


def looks(
    found: Source, surveyed: Survey, packed: Packed, ids: Ints, splits: Sequence[str], facts: Facts
) -> dict[str, Any]:
    """Summarise the images: sides, formats, bit depth, range, brightness, unusual images.

    `ids` are the rows of the readable images, `splits` are their splits.
    """
    short, long = surveyed.short[ids], surveyed.long[ids]
    formats = Counter(surveyed.formats[i] for i in surveyed.format[ids])

    def paths(rows: Iterable[int]) -> list[str]:
        return [found.items[i].path for i in rows]

    seen = {i: surveyed.seen[i] for i in ids.tolist() if i in surveyed.seen}
    return {
        "sides": {
            "shortest": int(short.min()),
            "median_short": float(np.median(short)),
            "longest": int(long.max()),
            "enlarged": int((short < facts.size).sum()),
        },
        "formats": dict(sorted(formats.items())),
        "levels": [
            int(np.percentile(packed.lowest[ids], LOWEST)),
            int(np.percentile(packed.highest[ids], HIGHEST)),
        ],
        "tones": facts.tones.words,
        "transparent": sum(bool(one.contrasts) for one in surveyed.seen.values()),
        "elsewhere": _elsewhere(surveyed, packed, ids, np.array(splits)),
        "one_colour": paths(ids[packed.lowest[ids] == packed.highest[ids]]),
        "clipped": paths(ids[packed.clipped[ids] > CLIPPED]),
        "nan": paths(i for i, one in seen.items() if one.nans),
        "negative": paths(i for i, one in seen.items() if one.negatives),
    }


def _elsewhere(surveyed: Survey, packed: Packed, ids: Ints, splits: NDArray[np.str_]) -> list[str]:
    """Describe how val and test images look as if they came from another source than train."""
    lines = []
    train = splits == "train"
    for split in ("val", "test"):
        other = splits == split
        if min(train.sum(), other.sum()) < LEAST_TO_COMPARE:
            continue
        told = []
        kinds = [(n, surveyed.format[ids] == i) for i, n in enumerate(surveyed.formats)]
        for name, is_so in (*kinds, ("grey", surveyed.grey[ids])):
            share, of_train = is_so[other].mean(), is_so[train].mean()
            if share - of_train > SHARE_OFF or (name == "grey" and of_train - share > SHARE_OFF):
                told.append(f"{share:.0%} {name} ({of_train:.0%})")
        for name, values in (
            ("shorter side", surveyed.short[ids].astype(float)),
            ("brightness", packed.mean[ids].astype(float)),
        ):
            here, there = values[other], values[train]
            spread = np.sqrt((here.var() + there.var()) / 2)
            if abs(here.mean() - there.mean()) > max(SPREADS_OFF * spread, LEAST_OFF):
                told.append(f"{name} {np.median(here):.0f} ({np.median(there):.0f})")
        if told:
            lines.append(
                f"{split} images look as if from elsewhere, training images in brackets: "
                f"{', '.join(told)}"
            )
    return lines


def report(
    found: Source,
    items: Sequence[Item],
    splits: Sequence[str],
    copies: Ints,
    alike: Ints,
    looks: dict[str, Any],
    unreadable: dict[str, str],
) -> dict[str, Any]:
    """Return the audit of a data set, as it is written to audit.json.

    `unreadable` maps paths to reasons, in any order. Equal files share a number in `copies`, near
    duplicates one in `alike`. Both are listed by path. Those `across_splits` would raise a score
    wrongly; those `across_labels` have a wrong label. Copies that were left out have an empty
    split.
    """

    def listed(numbers: NDArray[np.int64]) -> dict[str, list[list[str]]]:
        clustered = clusters(numbers)
        paths = [[items[i].path for i in cluster] for cluster in clustered]

        def across(values: Sequence[str]) -> list[list[str]]:
            return [
                path
                for path, cluster in zip(paths, clustered, strict=True)
                if len({values[i] for i in cluster}) > 1
            ]

        return {"all": paths, "across_splits": across(splits), "across_labels": across(labels)}

    labels = [item.label for item in items]
    table: dict[str, dict[str, int]] = {}
    for (label, split), n in sorted(Counter(zip(labels, splits, strict=True)).items()):
        if split:
            table.setdefault(label, {})[split] = n
    return {
        "layout": found.layout,
        "images": len(items),
        "classes": table,
        **looks,
        "skipped_not_images": dict(sorted(found.not_images.items())),
        "skipped_unreadable": dict(sorted(unreadable.items())),
        "skipped_copies": [i.path for i, split in zip(items, splits, strict=True) if not split],
        "equal_files": listed(copies),
        "near_duplicates": listed(alike),
    }
