"""What stages and commands say, and how far they are: handed to whoever shows it.

How it is shown (launcher/terminal.py) can't change a result, so no stage depends on it. Until a
display is set, lines are printed, and progress isn't shown.
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
    """What items belong to, such as classes, and how many each has in all."""

    of: Callable[[T], str]
    sizes: Mapping[str, int]


Update = Callable[[int, str], None]  # how many are done, and of what the last one was


class Display(Protocol):
    """What shows lines and progress."""

    def say(self, line: str) -> None:
        """Show a line."""

    def progress(self, name: str, total: int) -> AbstractContextManager[Update]:
        """Show how far something with `total` items is, as often as it is told."""


class Printed:
    """Lines on standard output, and no progress."""

    def say(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)

    def progress(self, name: str, total: int) -> AbstractContextManager[Update]:
        """Show nothing."""
        return nullcontext(lambda done, present: None)


_displays: list[Display] = [Printed()]  # the last one shows


def show_on(display: Display) -> None:
    """Show on this display from now on."""
    _displays.append(display)


def say(line: str) -> None:
    """Say one line. Of several processes that share a stage the first one speaks."""
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
    """Pass items on while showing how many of `total` are done, how fast, and the time left.

    An item counts for `width(item)`. With `parts` it shows how far the present one is, too. At the
    end a line says how long they took, if there is to be a `summary`.
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
    """Write a speed as people say it: 120/s, or 2.5 s each where an item takes longer."""
    if items and seconds > items:
        return f"{seconds / items:.1f} s each"
    return f"{items / max(seconds, 1e-9):.0f}/s"


def duration(seconds: float) -> str:
    """Write a time as people say it: 8.2 s, 1 min 40 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
