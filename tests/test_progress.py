"""What a person sees while something long runs, on a real terminal and without one."""

import os
import pty
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from pipeline.stage_runtime.progress import duration, rate

LONG = """
import time
from pipeline.launcher.terminal import Terminal
from pipeline.stage_runtime.progress import say, show_on, track
show_on(Terminal())
for item in track(range(20), 20, "work"):
    time.sleep(0.02)
say("end")
"""


def on_a_terminal(**env: str) -> str:
    """Run the long task on a terminal of its own and give what that receives."""
    ours, theirs = pty.openpty()
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
    process = subprocess.Popen(
        [sys.executable, "-c", LONG], cwd=ROOT, stdout=theirs, env={**inherited, **env}
    )
    os.close(theirs)
    received = b""
    try:
        while some := os.read(ours, 10_000):
            received += some
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    return received.decode()


def test_a_terminal_shows_how_far_how_fast_and_how_long_yet_and_then_a_line():
    seen = on_a_terminal(TERM="xterm-256color")
    assert "\x1b[" in seen
    assert re.search(r"\b[1-9]\d?/20.* \d+/s .*0:00:0", seen)
    last = seen.replace("\r", "").splitlines()[-2:]
    assert "20 in 0." in last[0]
    assert last[1] == "end"


@pytest.mark.parametrize("env", [{"TERM": "xterm-256color", "NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_wants_lines_alone_gets_them(env):
    lines = on_a_terminal(**env).splitlines()
    assert len(lines) == 2
    assert "\x1b" not in "".join(lines)


def test_without_a_terminal_there_are_lines_alone():
    said = subprocess.run(
        [sys.executable, "-c", LONG], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert len(said.splitlines()) == 2
    assert "\x1b" not in said


PARTS = """
import time
from pipeline.launcher import terminal
from pipeline.stage_runtime import progress
terminal.LINE_SECONDS = 0.1
progress.show_on(terminal.Terminal())
parts = progress.Breakdown(lambda item: "ants" if item < 30 else "bees", {"ants": 30, "bees": 10})
for item in progress.track(range(40), 40, "work", parts=parts):
    time.sleep(0.02)
"""


def test_without_a_terminal_a_long_task_says_now_and_then_how_far_it_is_and_where():
    said = subprocess.run(
        [sys.executable, "-c", PARTS], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = [
        re.fullmatch(r"work +(\d+) of 40 (\w+) (\d+)/(\d+), \d+/s, 0\.\d s left", line)
        for line in said[:-1]
    ]
    assert 3 <= len(found) <= 8
    for match in found:
        assert match is not None
        done, part, of_part, size = match.groups()
        first = part == "ants"
        assert size == ("30" if first else "10")
        assert int(of_part) == (int(done) if first else int(done) - 30)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (8.24, "8.2 s"),
        (100, "1 min 40 s"),
        (3600, "1 h 0 min"),
        (7519, "2 h 5 min"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds, said):
    assert duration(seconds) == said


def test_a_slow_item_has_its_seconds_rather_than_a_rate_of_0():
    assert rate(1200, 10) == "120/s"
    assert rate(4, 10) == "2.5 s each"
    assert rate(0, 10) == "0/s"
