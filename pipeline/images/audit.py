"""What is in a data set besides good images: counts, duplicates, files that can't be read."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.images.layout import Item


def clusters(numbers: NDArray[np.int64]) -> list[list[int]]:
    """List the positions that share a number, a list each, where two or more do; -1 is none."""
    order = np.argsort(numbers, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(numbers[order])) + 1, len(order))
    starts = np.append(0, ends[:-1])
    several = (ends - starts > 1) & (numbers[order[starts]] >= 0) if len(order) else []
    pairs = zip(starts[several], ends[several], strict=True)
    return sorted(order[start:end].tolist() for start, end in pairs)


def sides(short: NDArray[np.int64], long: NDArray[np.int64], size: int) -> dict[str, float]:
    """Summarise the images' sides in pixels; `enlarged` have a side below the packed `size`."""
    return {
        "shortest": int(short.min()),
        "median_short": float(np.median(short)),
        "longest": int(long.max()),
        "enlarged": int((short < size).sum()),
    }


def report(
    items: Sequence[Item],
    splits: Sequence[str],
    copies: NDArray[np.int64],
    alike: NDArray[np.int64],
    sides: dict[str, float],
    layout: Sequence[str],
    not_images: Sequence[str],
    unreadable: dict[str, str],
) -> dict[str, Any]:
    """Gather the audit of a data set, as it is written to audit.json.

    `layout` says what the source took for splits, classes and groups.
    `unreadable` gives the reason of each path, in whichever order threads met them. Equal files
    share a number in `copies`, near duplicates one in `alike`. Both are listed by path;
    `across_splits` and `across_labels` are those that would make a score too good or a label wrong.
    An empty split is that of a copy that was left out.
    """

    def listed(numbers: NDArray[np.int64]) -> dict[str, list[list[str]]]:
        found = clusters(numbers)
        paths = [[items[i].path for i in cluster] for cluster in found]

        def across(values: Sequence[str]) -> list[list[str]]:
            return [
                path
                for path, cluster in zip(paths, found, strict=True)
                if len({values[i] for i in cluster}) > 1
            ]

        return {"all": paths, "across_splits": across(splits), "across_labels": across(labels)}

    labels = [item.label for item in items]
    table: dict[str, dict[str, int]] = {}
    for (label, split), n in sorted(Counter(zip(labels, splits, strict=True)).items()):
        if split:
            table.setdefault(label, {})[split] = n
    return {
        "layout": list(layout),
        "images": len(items),
        "classes": table,
        "sides": sides,
        "skipped_not_images": list(not_images),
        "skipped_unreadable": dict(sorted(unreadable.items())),
        "skipped_copies": [i.path for i, split in zip(items, splits, strict=True) if not split],
        "equal_files": listed(copies),
        "near_duplicates": listed(alike),
    }
