"""A page in a real browser, Chromium, with its network off."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# What the page itself sees, once all of it is there.
SEEN = """<script>
addEventListener("load", () => setTimeout(() => {
  const inside = ".scroll, svg, .vega-embed";  // these scroll, or are drawn as a whole
  const wide = [...document.querySelectorAll("*")].filter(e => !e.closest(inside)
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80));
  parent.postMessage(JSON.stringify({
    width: innerWidth, needs: document.documentElement.scrollWidth, wide,
    broken: [...document.images].filter(i => !i.naturalWidth).length,
    requests: performance.getEntriesByType("resource").map(r => r.name)
      .filter(name => !name.startsWith("data:")),
    drawn: [...document.querySelectorAll("svg, canvas")]
      .filter(e => e.getBoundingClientRect().height > 50).length,
    text: document.body.innerText, paper: getComputedStyle(document.body).backgroundColor,
  }), "*");
}, 500));
</script></body>"""


# A window of any width: Chromium's own is never narrower than 500 pixels.
WINDOW = """<!doctype html><body><style>iframe {{ border: 0 }}</style><iframe src="{page}"
  style="width:{width}px; height:900px">
</iframe><script>addEventListener("message", e => document.body.dataset.seen = e.data)</script>"""


@dataclass(frozen=True)
class Seen:
    """What a browser shows of a page."""

    width: int  # of the window, in pixels
    needs: int  # the width that the page takes
    wide: list[
        str
    ]  # elements that reach out of the window, but for those that scroll by themselves
    broken: int  # pictures that don't show
    requests: list[str]  # whatever it asked for
    drawn: int  # charts
    text: str
    paper: str  # the background's colour
    console: list[str]  # lines


def look(page: Path, width: int = 1400, *options: str) -> Seen:
    """Open a page that lies in a folder of its own; the test is skipped without Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    text = page.read_text(encoding="utf-8")
    body, end, rest = text.rpartition("</body>")
    assert end
    seen, window = page.with_name("seen.html"), page.with_name("window.html")
    seen.write_text(body + SEEN + rest, encoding="utf-8")
    window.write_text(WINDOW.format(page=seen.name, width=width), encoding="utf-8")
    profile = page.parent / "profile"
    done = subprocess.run(
        [
            *(
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={profile}",
            ),
            *("--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *("--disable-background-networking", "--enable-logging=stderr", "--v=0"),
            *("--window-size=1600,1000", "--virtual-time-budget=20000", *options),
            *("--dump-dom", window.resolve().as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (found,) = re.findall(r'data-seen="([^"]*)"', done.stdout)
    facts: dict[str, Any] = json.loads(html.unescape(found))
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(**facts, console=console)
