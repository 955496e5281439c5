"""Terminal output of stages and commands: lines and progress bars; in files and pipes, lines."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.stage_runtime.progress import Update, duration
from pipeline.stage_runtime.progress import rate as rate_of
from pipeline.stage_runtime.settings import rank

LINE_SECONDS = 60  # between two lines of progress if there is no bar
console = Console(highlight=False, soft_wrap=True)


class Terminal:
    """A terminal, or a file or pipe in its place, which gets only lines."""

    def say(self, line: str) -> None:
        """Print one line, without markup and without wrapping."""
        console.print(line, markup=False)

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Update]:
        """Show a bar that disappears at the end; if there can be none, a line per minute.

        With NO_COLOR, and on a terminal that can't move its cursor, only lines are printed.
        """
        start = said = time.perf_counter()
        alive = sys.stdout.isatty() and not console.no_color and not console.is_dumb_terminal
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        hidden = not alive or rank() > 0

        def update(done: int, present: str) -> None:
            nonlocal said
            now = time.perf_counter()
            fast = rate_of(done, now - start)
            bar.update(task, completed=done, rate=fast, description=name + present)
            if not alive and rank() == 0 and now - said >= LINE_SECONDS and done:
                said = now
                left = duration((total - done) * (now - start) / done)
                self.say(f"{name:<16} {done} of {total}{present}, {fast}, {left} left")

        with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
            task = bar.add_task(name, total=total, rate="")
            yield update
