"""What is in a data set besides good images: counts, duplicates, files that can't be read."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from pipeline.images.sources import Item


def duplicates(hashes: Sequence[str]) -> list[list[int]]:
    """List the positions of images whose files are the same to the byte, a list a cluster."""
    where = defaultdict(list)
    for position, digest in enumerate(hashes):
        where[digest].append(position)
    return [positions for positions in where.values() if len(positions) > 1]


def report(
    items: Sequence[Item],
    splits: Sequence[str],
    hashes: Sequence[str],
    not_images: Sequence[str],
    unreadable: dict[str, str],
) -> dict[str, Any]:
    """Gather the audit of a data set, as it is written to audit.json.

    Duplicates are listed by path; `across_splits` and `across_labels` are those that would make a
    score too good or a label wrong.
    """
    clusters = duplicates(hashes)

    def across(values: Sequence[str]) -> list[list[str]]:
        return [
            [items[i].path for i in cluster]
            for cluster in clusters
            if len({values[i] for i in cluster}) > 1
        ]

    labels = [item.label for item in items]
    table: dict[str, dict[str, int]] = {}
    for (label, split), n in sorted(Counter(zip(labels, splits, strict=True)).items()):
        table.setdefault(label, {})[split] = n
    return {
        "images": len(items),
        "classes": table,
        "skipped_not_images": list(not_images),
        "skipped_unreadable": unreadable,
        "duplicates": {
            "exact": [[items[i].path for i in cluster] for cluster in clusters],
            "across_splits": across(splits),
            "across_labels": across(labels),
        },
    }


def summary(report: dict[str, Any]) -> list[str]:
    """Say in a few lines what audit.json holds."""
    lines = [
        f"{label:<16} " + ", ".join(f"{n} {split}" for split, n in counts.items())
        for label, counts in report["classes"].items()
    ]
    for name in ("skipped_not_images", "skipped_unreadable"):
        if names := list(report[name]):
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(f"{name.replace('_', ' ')}: {len(names)} ({shown})")
    clusters = report["duplicates"]
    if clusters["exact"]:
        lines.append(
            f"exact duplicates: {len(clusters['exact'])} clusters, "
            f"{len(clusters['across_splits'])} across splits, "
            f"{len(clusters['across_labels'])} across labels"
        )
    return lines
