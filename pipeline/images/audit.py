"""What is in a data set besides good images: counts, duplicates, files that can't be read."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from pipeline.images.sources import Item


def clusters(names: Sequence[str]) -> list[list[int]]:
    """List the positions that share a name, a list a name, where two or more do; "" is no name."""
    where = defaultdict(list)
    for position, name in enumerate(names):
        if name:
            where[name].append(position)
    return [positions for positions in where.values() if len(positions) > 1]


def sides(short: Sequence[int], long: Sequence[int], size: int) -> dict[str, float]:
    """Summarise the images' sides in pixels; `enlarged` have a side below the packed `size`."""
    return {
        "shortest": min(short),
        "median_short": median(short),
        "longest": max(long),
        "enlarged": sum(side < size for side in short),
    }


def report(
    items: Sequence[Item],
    splits: Sequence[str],
    hashes: Sequence[str],
    alike: Sequence[str],
    sides: dict[str, float],
    not_images: Sequence[str],
    unreadable: dict[str, str],
) -> dict[str, Any]:
    """Gather the audit of a data set, as it is written to audit.json.

    Equal files share a hash, near duplicates a name in `alike`. Both are listed by path;
    `across_splits` and `across_labels` are those that would make a score too good or a label wrong.
    An empty split is that of a copy that was left out.
    """

    def listed(names: Sequence[str]) -> dict[str, list[list[str]]]:
        found = clusters(names)
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
        "images": len(items),
        "classes": table,
        "sides": sides,
        "skipped_not_images": list(not_images),
        "skipped_unreadable": unreadable,
        "skipped_copies": [i.path for i, split in zip(items, splits, strict=True) if not split],
        "equal_files": listed(hashes),
        "near_duplicates": listed(alike),
    }
