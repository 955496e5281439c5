"""What audit.json holds, in a few lines."""

from typing import Any


def summary(report: dict[str, Any]) -> list[str]:
    """Say in a few lines what audit.json holds."""
    counts = [
        f"{label:<16} " + ", ".join(f"{n} {split}" for split, n in counts.items())
        for label, counts in report["classes"].items()
    ]
    return counts + findings(report)


def findings(report: dict[str, Any]) -> list[str]:
    """Say in a few lines what was found besides the counts."""
    lines = []
    there = {split for counts in report["classes"].values() for split in counts}
    for label, counts in report["classes"].items():
        for split in sorted(there - set(counts)):
            lines.append(f"no {label} in {split}: nothing there tells how well it is recognised")
    found = report["sides"]
    lines.append(
        f"sides: {found['shortest']} to {found['longest']} pixels, the shorter one "
        f"{found['median_short']:g} in the median; {found['enlarged']} images enlarged"
    )
    for name in ("skipped_not_images", "skipped_unreadable", "skipped_copies"):
        if names := list(report[name]):
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(f"{name.replace('_', ' ')}: {len(names)} ({shown})")
    for name in ("equal_files", "near_duplicates"):
        found = report[name]
        if found["all"]:
            lines.append(
                f"{name.replace('_', ' ')}: {len(found['all'])} clusters, "
                f"{len(found['across_splits'])} across splits, "
                f"{len(found['across_labels'])} across labels"
            )
    return lines
