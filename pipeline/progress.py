"""What a person sees while a stage works; plain lines where there is no terminal."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.runtime import rank

T = TypeVar("T")
console = Console(highlight=False, soft_wrap=True)


def track(
    items: Iterable[T], total: int, name: str, width: Callable[[T], int] = lambda item: 1
) -> Iterator[T]:
    """Pass items on while showing how many of `total` are done, how fast, and the time left.

    An item counts for `width(item)`. At the end it prints one line.
    """
    start = time.perf_counter()
    yield from bar(items, total, name, width)
    seconds = time.perf_counter() - start
    say(f"{name:<16} {total} in {seconds:.1f} s, {total / max(seconds, 1e-9):.0f}/s")


def bar(
    items: Iterable[T], total: int, name: str, width: Callable[[T], int] = lambda item: 1
) -> Iterator[T]:
    """Pass items on under a bar that goes when they end; in silence where only lines are wanted.

    That is without a terminal, with NO_COLOR, and on one that can't move its cursor.
    """
    start = time.perf_counter()
    alive = sys.stdout.isatty() and not console.no_color and not console.is_dumb_terminal
    if alive and rank() == 0:
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(name, total=total, rate="")
            done = 0
            for item in items:
                yield item
                done += width(item)
                rate = f"{done / (time.perf_counter() - start):.0f}/s"
                progress.update(task, completed=done, rate=rate)
    else:
        yield from items


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
