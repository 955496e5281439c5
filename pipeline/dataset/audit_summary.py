"""A summary of audit.json in a few lines."""

from typing import Any

MOST_CLASSES = 20  # that are listed on a line each
FEW_LEVELS = 64
ODD = {
    "one_colour": "images of one colour",
    "clipped": "images with values outside the range",
    "nan": "images with NaN values, which become black",
    "negative": "images with negative values",
}


def summary(report: dict[str, Any]) -> list[str]:
    """Return a few lines that summarise audit.json."""
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
    """Return a few lines that summarise all but the counts."""
    lines = _missing(report["classes"])
    found = report["sides"]
    lines.append(
        f"sides: {found['shortest']} to {found['longest']} pixels, median of the shorter side "
        f"{found['median_short']:g}; {found['enlarged']} images enlarged"
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
    """Return the lines about unusual images."""
    lines = []
    if report["tones"]:
        lines.append(f"tones: {report['tones']}")
    elif report["transparent"]:
        lines.append(f"tones: transparent parts become white ({report['transparent']} images)")
    low, high = report["levels"]
    if not report["tones"] and high - low < FEW_LEVELS:
        lines.append(
            f"the images use only levels {low} to {high} of 256: detail may have been lost before"
        )
    lines += report["elsewhere"]
    for name, said in ODD.items():
        if names := report[name]:
            lines.append(f"{said}: {len(names)} ({_first(names)})")
    return lines


def _missing(classes: dict[str, dict[str, int]]) -> list[str]:
    """Return a line for each class without images in a split that other classes have."""
    missing = {
        split: [c for c, of in classes.items() if split not in of] for split in _splits(classes)
    }
    if len(classes) > MOST_CLASSES:
        return [
            f"no {_first(names)} ({len(names)} classes) in {split}: how well they are recognised "
            "is not measured there"
            for split, names in missing.items()
            if names
        ]
    return [
        f"no {label} in {split}: how well it is recognised is not measured there"
        for label in classes
        for split, names in missing.items()
        if label in names
    ]


def _splits(classes: dict[str, dict[str, int]]) -> list[str]:
    return sorted({split for counts in classes.values() for split in counts})


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
