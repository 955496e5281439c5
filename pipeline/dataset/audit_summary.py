"""What audit.json holds, in a few lines."""

from typing import Any

MOST_CLASSES = 20  # that have a line each
FEW_LEVELS = 64
ODD = {
    "one_colour": "of one colour",
    "clipped": "with values beyond the range",
    "nan": "with values that are no numbers, taken as black",
    "negative": "with negative values",
}


def summary(report: dict[str, Any]) -> list[str]:
    """Say in a few lines what audit.json holds."""
    layout: list[str] = report["layout"]
    classes, counts = report["classes"], list(report["classes"].values())
    if len(classes) > MOST_CLASSES:
        each = {split: [of.get(split, 0) for of in counts] for split in _splits(classes)}
        said = ", ".join(f"{min(of)} to {max(of)} {split}" for split, of in each.items())
        return [*layout, f"{len(classes)} classes: {said}", *findings(report)]
    lines = layout + [
        f"{label:<16} " + ", ".join(f"{n} {split}" for split, n in of.items())
        for label, of in classes.items()
    ]
    return lines + findings(report)


def findings(report: dict[str, Any]) -> list[str]:
    """Say in a few lines what was found besides the counts."""
    lines = _missing(report["classes"])
    found = report["sides"]
    lines.append(
        f"sides: {found['shortest']} to {found['longest']} pixels, the shorter one "
        f"{found['median_short']:g} in the median; {found['enlarged']} images enlarged"
    )
    lines += _looks(report)
    for name in ("skipped_not_images", "skipped_unreadable", "skipped_copies"):
        if names := list(report[name]):
            lines.append(f"{name.replace('_', ' ')}: {len(names)} ({_first(names)})")
    for name in ("equal_files", "near_duplicates"):
        found = report[name]
        if found["all"]:
            lines.append(
                f"{name.replace('_', ' ')}: {len(found['all'])} clusters, "
                f"{len(found['across_splits'])} across splits, "
                f"{len(found['across_labels'])} across labels"
            )
    return lines


def _looks(report: dict[str, Any]) -> list[str]:
    """Say what is odd about how images look."""
    lines = []
    if report["tones"]:
        lines.append(f"tones: {report['tones']}")
    elif report["transparent"]:
        lines.append(f"tones: transparent parts become white ({report['transparent']} images)")
    low, high = report["levels"]
    if not report["tones"] and high - low < FEW_LEVELS:
        lines.append(
            f"the images use the levels {low} to {high} of 256: detail may have been lost before"
        )
    lines += report["elsewhere"]
    for name, said in ODD.items():
        if names := report[name]:
            lines.append(f"{said}: {len(names)} ({_first(names)})")
    return lines


def _missing(classes: dict[str, dict[str, int]]) -> list[str]:
    """Say which classes have no images in a split that others have images in."""
    missing = {
        split: [c for c, of in classes.items() if split not in of] for split in _splits(classes)
    }
    if len(classes) > MOST_CLASSES:
        return [
            f"no {_first(names)} ({len(names)} classes) in {split}: nothing there tells how well "
            "they are recognised"
            for split, names in missing.items()
            if names
        ]
    return [
        f"no {label} in {split}: nothing there tells how well it is recognised"
        for label in classes
        for split, names in missing.items()
        if label in names
    ]


def _splits(classes: dict[str, dict[str, int]]) -> list[str]:
    return sorted({split for counts in classes.values() for split in counts})


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
