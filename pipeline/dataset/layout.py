"""What the folders of a data set are: splits, classes or groups, by their names and positions."""

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.images.shards import SPLITS
from pipeline.stage_runtime.errors import DataError, ParamError, suggest

# Common names of splits.
WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation", "holdout", "heldout"), "test"),
}
# Words beside them that are ignored: training_set, TestImages, val2017.
NEUTRAL = {
    *("set", "sets", "data", "dataset", "split", "folder", "samples", "the"),
    *("image", "images", "img", "imgs", "pictures", "photos", "jpg", "jpeg", "png"),
}
LIKE_SPLITS = 0.8  # share of common sub-folders from which top folders look like splits
AUTO, NONE = "auto", "none"


@dataclass(frozen=True, slots=True)
class Item:
    """One image: its path, its label, and the group that must stay in one split."""

    path: str  # relative to the source's folder, with forward slashes
    label: str
    split: str = ""  # empty: to be assigned
    group: str = ""  # empty: that of its near duplicates
    weight: float = 1.0


@dataclass
class _Plan:
    """How many levels of folders to skip, and what the others are."""

    passed: int  # levels to skip, above all others
    splits: dict[str, str] = field(default_factory=dict)  # folder name to split
    below: bool = False  # the splits are below the classes
    wrapped: bool = False  # one more folder is between split and classes


def split_of(word: str) -> str:
    """Return the split that a word names: train, val, test, or empty for none."""
    return _of_tokens(_tokens(word))


def splits_of(names: Iterable[str]) -> dict[str, str]:
    """Map those folders that are splits to their split; words that all share are ignored."""
    names = sorted(names)
    tokens = {name: _tokens(name) for name in names}
    shared = set.intersection(*(set(of) for of in tokens.values())) if len(names) > 1 else set()
    shared -= set(WORDS)
    found = {n: _of_tokens([t for t in of if t not in shared]) for n, of in tokens.items()}
    return {name: split for name, split in found.items() if split}


def _tokens(name: str) -> list[str]:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    tokens = [t.lower() for t in re.findall(r"[^\W\d_]+", name)]
    return [part for token in tokens for part in _unglued(token)]


def _unglued(token: str) -> list[str]:
    for word in NEUTRAL:
        if token.endswith(word) and token.removesuffix(word) in WORDS:
            return [token.removesuffix(word)]
    return [token]


def _of_tokens(tokens: Sequence[str]) -> str:
    rest = [t for t in tokens if t not in NEUTRAL]
    if rest in (["hold", "out"], ["held", "out"]):
        rest = ["holdout"]
    if rest in (["train", "val"], ["train", "valid"], ["train", "validation"]):
        rest = ["train"]
    return WORDS.get(rest[0], "") if len(rest) == 1 else ""


@dataclass
class Layout:
    """What the folders of a data set are."""

    items: list[Item]
    said: list[str]  # how the folders were interpreted, in words
    _plan: "_Plan"

    def without(self, others: Iterable[str]) -> list[tuple[str, list[str]]]:
        """List the classes that have a folder but no image, with the folder's other content.

        `others` are files that aren't images, and empty folders with a trailing slash.
        """
        labels = {item.label for item in self.items}
        gone: dict[str, list[str]] = {}
        for other in sorted(others):
            *above, _ = other.split("/")[self._plan.passed :] or [""]
            try:
                label = _item(Path(), other, above, self._plan).label
            except (DataError, KeyError, IndexError):
                continue  # in no class folder
            if label not in labels:
                gone.setdefault(label, []).append(other)
        return sorted(gone.items())


def read(path: Path, images: Sequence[str], splits: str) -> Layout:
    """Return each image's class, split and group, by its folders, and describe the folders.

    `images` are relative to `path`, `splits` is the param: auto, none, or NAME:SPLIT, ...

    Raises DataError if the folders are ambiguous, ParamError if the param is invalid.
    """
    above = [image.split("/")[:-1] for image in images]
    plan, lines = _passed_over(above, splits), []
    if plan.passed:
        parents = "/".join(above[0][: plan.passed])
        lines.append(f"passed over: {parents}, which holds all other folders")
    above = [of[plan.passed :] for of in above]
    _find_splits(path, images, above, splits, plan)
    items = [_item(path, i, of, plan) for i, of in zip(images, above, strict=True)]
    return Layout(items, lines + _said(items, above, plan), plan)


def _passed_over(above: Sequence[Sequence[str]], splits: str) -> _Plan:
    """Find the folders that contain all others, such as an archive's own folder."""
    passed, given = 0, _given(splits)
    while True:
        names = {of[passed] if len(of) > passed else "" for of in above}
        deeper = {of[passed + 1] if len(of) > passed + 1 else "" for of in above}
        [name, *others] = sorted(names)
        is_split = splits != NONE and (split_of(name) or name in given)
        if others or is_split:
            return _Plan(passed)
        if not name or "" in deeper:  # one class, perhaps with groups below
            return _Plan(0)
        passed += 1


def _given(splits: str) -> dict[str, str]:
    """Parse the param: folder names to splits.

    Raises ParamError for any other text.
    """
    if splits in (AUTO, NONE):
        return {}
    found = {}
    for part in splits.split(","):
        name, colon, split = (text.strip() for text in part.rpartition(":"))
        if not colon or not name or split not in SPLITS:
            raise ParamError(
                f"params.yaml: prepare.splits = {splits!r}: expected auto, none, or folders and "
                "splits, such as Training:train, Testing:test"
            )
        found[name] = split
    return found


def _find_splits(
    path: Path, images: Sequence[str], above: Sequence[Sequence[str]], splits: str, plan: _Plan
) -> None:
    """Find out which folders are splits, and store them in the plan."""
    top = sorted({of[0] for of in above if of})
    if splits == NONE:
        return
    if given := _given(splits):
        if missing := sorted(set(given) - set(top)):
            raise ParamError(
                f"params.yaml: prepare.splits: no folder {missing[0]!r} in {path}; "
                f"{suggest(missing[0], top)}"
            )
        if others := sorted(set(top) - set(given)):
            raise DataError(f"{path}: prepare.splits doesn't name {others[0]}; name it, or move it")
        plan.splits = given
    else:
        plan.splits = splits_of(top)
        if plan.splits and (others := sorted(set(top) - set(plan.splits))):
            raise DataError(
                f"{path}: {others[0]} is beside {sorted(plan.splits)[0]}, which looks like a "
                "split; move it away, or set prepare.splits: none if both are classes"
            )
        twice = [s for s, times in Counter(plan.splits.values()).items() if times > 1]
        if twice:
            names = ", ".join(n for n, s in plan.splits.items() if s == twice[0])
            raise DataError(
                f"{path}: more than one folder for the {twice[0]} split ({names}); keep one, or "
                "set prepare.splits"
            )
    if not plan.splits:
        _look_below(path, above, plan)
        return
    for image, of in zip(images, above, strict=True):
        if len(of) == 1:
            raise DataError(
                f"{path / image}: is in {of[0]}, a split, but not in a class folder; move it into "
                "one, or set prepare.splits: none if that is a class"
            )
    inner = {name: {of[1] for of in above if of and of[0] == name} for name in plan.splits}
    deep = all(len(of) > 2 for of in above if of)
    plan.wrapped = deep and all(len(names) == 1 for names in inner.values())


def _look_below(path: Path, above: Sequence[Sequence[str]], plan: _Plan) -> None:
    """Find splits below the classes, and refuse top folders that seem to be splits."""
    below: dict[str, set[str]] = {}
    for of in above:
        if of:
            below.setdefault(of[0], set()).add(of[1] if len(of) > 1 else "")
    if len(below) < 2 or any("" in names for names in below.values()):
        return
    found = splits_of(set.union(*below.values()))
    if set(found) == set.union(*below.values()) and len(set(found.values())) > 1:
        plan.splits, plan.below = found, True
        return
    largest = max(below.values(), key=len)
    alike = [len(names & largest) / len(names | largest) for names in below.values()]
    inside = all(names <= largest for names in below.values())
    if len(largest) > 1 and (inside or min(alike) >= LIKE_SPLITS):
        names, held = ", ".join(sorted(below)[:4]), ", ".join(sorted(largest)[:3])
        raise DataError(
            f"{path}: these look like splits: {names} (each holds {held}); name them train, val, "
            "test, or set prepare.splits (none: they are classes, and the folders below groups)"
        )


def _item(path: Path, image: str, above: Sequence[str], plan: _Plan) -> Item:
    split, below = "", list(above)
    if plan.splits and plan.below:
        split = plan.splits[below.pop(1)]
    elif plan.splits and below:
        split = plan.splits[below.pop(0)]
        below = below[1:] if plan.wrapped else below
    if not below:
        raise DataError(f"{path / image}: is not in a class folder; move it into one")
    group = "/".join(below) if len(below) > 1 else ""
    return Item(image, sys.intern(below[0]), split, group)


def _said(items: Sequence[Item], above: Sequence[Sequence[str]], plan: _Plan) -> list[str]:
    """Describe how the folders were interpreted, with counts."""
    lines = []
    if plan.splits:
        level = 1 if plan.below else 0
        counts = Counter(of[level] for of in above)
        named = ", ".join(f"{n} is {s} ({counts[n]} images)" for n, s in plan.splits.items())
        lines.append(f"split folders{' below the classes' if plan.below else ''}: {named}")
    classes = {item.label for item in items}
    groups = {item.group for item in items} - {""}
    held = f"{len(groups)} folders of groups below them" if groups else "no folders of groups below"
    lines.append(f"class folders: {len(classes)} ({_first(sorted(classes))}); {held}")
    return lines


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
