"""What a person sees while a stage or command works; plain lines where there is no terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.stage_runtime.progress import Update, duration
from pipeline.stage_runtime.progress import rate as rate_of
from pipeline.stage_runtime.settings import rank

LINE_SECONDS = 60  # between two lines of progress where there is no bar
console = Console(highlight=False, soft_wrap=True)


class Terminal:
    """A terminal, or a file or pipe in place of one, which gets lines alone."""

    def say(self, line: str) -> None:
        """Print one line, markup-free, whole even where it is longer than the terminal."""
        console.print(line, markup=False)

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Update]:
        """Show a bar that goes when all is done; where there can be none, a line a minute.

        Lines alone are wanted with NO_COLOR, and on a terminal that can't move its cursor.
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
