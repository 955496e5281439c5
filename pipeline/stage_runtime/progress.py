"""Messages and progress of stages and commands, passed on to a display.

The display (launcher/terminal.py) can't change a result, so no stage depends on it. Until one is
set, lines are printed, and progress isn't shown.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pipeline.stage_runtime.settings import rank

T = TypeVar("T")


@dataclass(frozen=True)
class Breakdown(Generic[T]):
    """The parts that items belong to, such as classes, and each part's number of items."""

    of: Callable[[T], str]
    sizes: Mapping[str, int]


Update = Callable[[int, str], None]  # takes the number of items done and the last one's part


class Display(Protocol):
    """An object that shows lines and progress."""

    def say(self, line: str) -> None:
        """Show a line."""

    def progress(self, name: str, total: int) -> AbstractContextManager[Update]:
        """Show the progress of a task with `total` items at each update."""


class Printed:
    """Lines on standard output, and no progress."""

    def say(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)

    def progress(self, name: str, total: int) -> AbstractContextManager[Update]:
        """Show nothing."""
        return nullcontext(lambda done, present: None)


_displays: list[Display] = [Printed()]  # the last one is used


def show_on(display: Display) -> None:
    """Use this display from now on."""
    _displays.append(display)


def say(line: str) -> None:
    """Show one line. If several processes share a stage, only the first one does."""
    if rank() == 0:
        _displays[-1].say(line)


def track(
    items: Iterable[T],
    total: int,
    name: str,
    width: Callable[[T], int] = lambda item: 1,
    parts: Breakdown[T] | None = None,
    summary: bool = True,
) -> Iterator[T]:
    """Yield the items while showing how many of `total` are done, how fast, and the time left.

    An item counts as `width(item)`. With `parts`, the progress of the current part is shown too.
    With `summary`, a line at the end reports the total time.
    """
    start = time.perf_counter()
    done, of_part, present = 0, Counter[str](), ""
    with _displays[-1].progress(name, total) as update:
        for item in items:
            yield item
            done += width(item)
            if parts:
                part = parts.of(item)
                of_part[part] += width(item)
                present = f" {part} {of_part[part]}/{parts.sizes[part]}"
            update(done, present)
    if summary:
        seconds = time.perf_counter() - start
        say(f"{name:<16} {total} in {seconds:.1f} s, {rate(total, seconds)}")


def rate(items: int, seconds: float) -> str:
    """Format a rate: 120/s, or 2.5 s each if an item takes longer than a second."""
    if items and seconds > items:
        return f"{seconds / items:.1f} s each"
    return f"{items / max(seconds, 1e-9):.0f}/s"


def duration(seconds: float) -> str:
    """Format a duration: 8.2 s, 1 min 40 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
