"""Render self-contained HTML pages, which need no other file and no internet access."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

HERE = Path(__file__).parent
EVIDENCE = (230, 159, 0)  # orange of Okabe and Ito's palette, on grey


def render(template: Path, **values: Any) -> str:
    """Fill a template, which may extend one of this folder; all values but charts are escaped."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template(template.name).render(**values) + "\n"


def percent(share: float | str | None) -> str:
    """Format a share as a percentage, also one read from a CSV file: 0.8180 is 81.8 %."""
    return "-" if share in ("", None) else f"{100 * float(share):.1f} %"


def picture(pixels: NDArray[np.uint8], side: int) -> str:
    """Return packed pixels (H, W[, 3]) as the data URL of an image."""
    return _address(_shrunk(Image.fromarray(pixels), side))


def evidence_picture(
    pixels: NDArray[np.uint8], evidence: NDArray[np.floating[Any]], side: int
) -> str:
    """Overlay packed pixels, in grey, with a map of evidence (h, w) from 0 to 1, in colour."""
    grey = _shrunk(Image.fromarray(pixels), side).convert("L")
    shown = Image.fromarray(evidence.astype(np.float32)).resize(grey.size, Image.Resampling.BICUBIC)
    opacity = 0.7 * np.asarray(shown).clip(0, 1)[..., None]  # (H, W, 1)
    laid = (1 - opacity) * np.asarray(grey)[..., None] + opacity * np.array(EVIDENCE)
    return _address(Image.fromarray(laid.round().astype(np.uint8)))


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    image.thumbnail((side, side))
    return image


def _address(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
