"""Plots: write the page that `dvc plots` fills; it includes its script and needs no network.

python -m pipeline plots .venv/plots.html      # `make install` runs both commands
dvc config --local plots.html_template ../.venv/plots.html
"""

from pathlib import Path

from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.pages.charts import script
from pipeline.pages.render import render
from pipeline.stage_runtime.files import write_text

TEMPLATE = Path(__file__).parent / "pages" / "plots.html"


def main() -> None:
    """Run from the command line."""
    parser = parser_of("plots", __doc__ or "")
    parser.add_argument("page", type=Path, metavar="HTML")
    options = parser.parse_args()
    with one_line_errors():
        write_text(options.page, render(TEMPLATE, script=script()))
