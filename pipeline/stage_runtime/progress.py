"""What a person sees while a stage works; plain lines where there is no terminal."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.stage_runtime.settings import rank

T = TypeVar("T")
LINE_SECONDS = 60  # between two lines of progress where there is no bar
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Parts(Generic[T]):
    """What items belong to, such as classes, and how many each has in all."""

    of: Callable[[T], str]
    sizes: Mapping[str, int]


def track(
    items: Iterable[T],
    total: int,
    name: str,
    width: Callable[[T], int] = lambda item: 1,
    parts: Parts[T] | None = None,
) -> Iterator[T]:
    """Pass items on while showing how many of `total` are done, how fast, and the time left.

    An item counts for `width(item)`. With `parts` it says how far the present one is, too. At the
    end it prints one line.
    """
    start = time.perf_counter()
    yield from bar(items, total, name, width, parts)
    seconds = time.perf_counter() - start
    say(f"{name:<16} {total} in {seconds:.1f} s, {total / max(seconds, 1e-9):.0f}/s")


def bar(
    items: Iterable[T],
    total: int,
    name: str,
    width: Callable[[T], int] = lambda item: 1,
    parts: Parts[T] | None = None,
) -> Iterator[T]:
    """Pass items on under a bar that goes when they end; where only lines are wanted, one a minute.

    That is without a terminal, with NO_COLOR, and on one that can't move its cursor.
    """
    start = said = time.perf_counter()
    done, of_part = 0, Counter[str]()
    alive = sys.stdout.isatty() and not console.no_color and not console.is_dumb_terminal
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    shown = Progress(*columns, console=console, transient=True, disable=not alive or rank() > 0)
    with shown as progress:
        task = progress.add_task(name, total=total, rate="")
        for item in items:
            yield item
            done += width(item)
            now, present = time.perf_counter(), ""
            if parts:
                part = parts.of(item)
                of_part[part] += width(item)
                present = f" {part} {of_part[part]}/{parts.sizes[part]}"
            rate = done / max(now - start, 1e-9)
            label = name + present
            progress.update(task, completed=done, rate=f"{rate:.0f}/s", description=label)
            if not alive and now - said >= LINE_SECONDS:
                said = now
                left = duration((total - done) / rate)
                say(f"{name:<16} {done} of {total}{present}, {rate:.0f}/s, {left} left")


def duration(seconds: float) -> str:
    """Write a time as people say it: 8.2 s, 1 min 40 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def say(line: str) -> None:
    """Print one line, markup-free, whole even where it is longer than the terminal.

    Of several processes that share a stage the first one speaks.
    """
    if rank() == 0:
        console.print(line, markup=False)
