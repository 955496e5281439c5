"""Shared by all commands: the help text, from the module's docstring, and one-line user errors."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.stage_runtime.errors import PipelineError, is_out_of_memory


def parser_of(command: str, about: str) -> argparse.ArgumentParser:
    """Return a command's parser, whose help text is the module's docstring."""
    summary, _, rest = about.partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m pipeline {command}",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _write_any_name() -> None:
    """Let a terminal of any encoding print any file name: as its own bytes, or else escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            unicode = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if unicode else "backslashreplace")


@contextmanager
def one_line_errors(interrupted: str = "interrupted", recover: str = "") -> Iterator[None]:
    """Print a user error as one line and exit with its code; with PIPELINE_DEBUG=1, raise it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as the package set it for its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _write_any_name()
    try:
        try:
            yield
        finally:  # also before an exit: later, the interpreter would report a broken pipe
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # as for a process that SIGPIPE killed, on systems that have it
    except KeyboardInterrupt:
        sys.exit(interrupted)
    except Exception as error:
        if os.environ.get("PIPELINE_DEBUG"):
            raise
        ways = f"; {recover}" if recover else ""
        if isinstance(error, PipelineError):
            said = str(error).replace("\n", "\\n")  # of a file name
            print(f"error: {said}", file=sys.stderr)
            sys.exit(error.exit_code)
        if is_out_of_memory(error):
            sys.exit(f"error: out of memory; use smaller images or batches{ways}")
        if not isinstance(error, OSError):
            raise  # a bug, not a user error
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {place}{error.strerror or error}{ways}")
