"""What a person sees while a stage or command works; plain lines where there is no terminal."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.stage_runtime.progress import Breakdown, duration
from pipeline.stage_runtime.settings import rank

T = TypeVar("T")
LINE_SECONDS = 60  # between two lines of progress where there is no bar
console = Console(highlight=False, soft_wrap=True)


class Terminal:
    """A terminal, or a file or pipe in place of one, which gets lines alone."""

    def say(self, line: str) -> None:
        """Print one line, markup-free, whole even where it is longer than the terminal."""
        console.print(line, markup=False)

    def bar(
        self,
        items: Iterable[T],
        total: int,
        name: str,
        width: Callable[[T], int],
        parts: Breakdown[T] | None,
    ) -> Iterator[T]:
        """Pass items on under a bar that goes when they end; without a bar, a line a minute.

        Lines alone are wanted with NO_COLOR, and on a terminal that can't move its cursor.
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
        hidden = not alive or rank() > 0
        with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
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
                if not alive and rank() == 0 and now - said >= LINE_SECONDS:
                    said = now
                    left = duration((total - done) / rate)
                    self.say(f"{name:<16} {done} of {total}{present}, {rate:.0f}/s, {left} left")
