"""What stages and commands say, and how far they are: handed to whoever shows it.

How it is shown (launcher/terminal.py) can't change a result, so no stage depends on it. Until a
display is set, lines are printed, and progress isn't shown.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pipeline.stage_runtime.settings import rank

T = TypeVar("T")


@dataclass(frozen=True)
class Breakdown(Generic[T]):
    """What items belong to, such as classes, and how many each has in all."""

    of: Callable[[T], str]
    sizes: Mapping[str, int]


class Display(Protocol):
    """What shows lines and progress."""

    def say(self, line: str) -> None:
        """Show a line."""

    def bar(
        self,
        items: Iterable[T],
        total: int,
        name: str,
        width: Callable[[T], int],
        parts: Breakdown[T] | None,
    ) -> Iterator[T]:
        """Pass items on while showing how far they are."""


class Printed:
    """Lines on standard output, and no progress."""

    def say(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)

    def bar(
        self,
        items: Iterable[T],
        total: int,
        name: str,
        width: Callable[[T], int],
        parts: Breakdown[T] | None,
    ) -> Iterator[T]:
        """Pass items on."""
        yield from items


_displays: list[Display] = [Printed()]  # the last one shows


def show_on(display: Display) -> None:
    """Show on this display from now on."""
    _displays.append(display)


def say(line: str) -> None:
    """Say one line. Of several processes that share a stage the first one speaks."""
    if rank() == 0:
        _displays[-1].say(line)


def bar(
    items: Iterable[T],
    total: int,
    name: str,
    width: Callable[[T], int] = lambda item: 1,
    parts: Breakdown[T] | None = None,
) -> Iterator[T]:
    """Pass items on while showing how many of `total` are done, how fast, and the time left.

    An item counts for `width(item)`. With `parts` it shows how far the present one is, too.
    """
    yield from _displays[-1].bar(items, total, name, width, parts)


def track(
    items: Iterable[T],
    total: int,
    name: str,
    width: Callable[[T], int] = lambda item: 1,
    parts: Breakdown[T] | None = None,
) -> Iterator[T]:
    """Pass items on as `bar` does, and say in a line at the end how long they took."""
    start = time.perf_counter()
    yield from bar(items, total, name, width, parts)
    seconds = time.perf_counter() - start
    say(f"{name:<16} {total} in {seconds:.1f} s, {total / max(seconds, 1e-9):.0f}/s")


def duration(seconds: float) -> str:
    """Write a time as people say it: 8.2 s, 1 min 40 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
