"""Conversion of images to 8 bits, with one range and one background for the whole data set.

Images of 8 bits are unchanged. In deeper images (12 or 16 bits, 32-bit integers, floats), the
values from `low` to `high` are scaled to the 256 levels, and values outside are clipped.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.stage_runtime.errors import ParamError

Background = Literal["white", "black", "grey"]
LEVELS: dict[str, int] = {"white": 255, "black": 0, "grey": 128}
AUTO = "auto"
DARKEST, BRIGHTEST = 0.001, 0.999  # quantiles of an image's values: a hot pixel doesn't count
# Percentiles of these quantiles over the images: a few overexposed images don't count.
LOWEST, HIGHEST = 1, 99
HIDDEN = 0.1  # contrast, from 0 to 1, below which an image is invisible on its background
MOST_HIDDEN = 0.1  # share of the transparent images that may be invisible on white

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Tones:
    """How the images of a data set are converted to 8 bits."""

    low: float | None = None  # None: the images have 8 bits
    high: float | None = None
    background: Background = "white"  # behind transparent parts

    def facts(self) -> dict[str, Any]:
        """Return the `tones` of a data set's facts; empty for the usual ones."""
        return {} if self == PLAIN else {"tones": asdict(self)}

    @property
    def words(self) -> str:
        """Return the tones in words; empty for the usual ones."""
        parts = []
        if self.low is not None:
            parts.append(f"values {self.low:g} to {self.high:g} become 0 to 255")
        if self.background != "white":
            parts.append(f"transparent parts become {self.background}")
        return ", ".join(parts)


PLAIN = Tones()  # of nearly all data sets


class Seen(NamedTuple):
    """What was measured of a deep or transparent image before it is packed."""

    low: float = np.nan  # of its values, without a thousandth at either end
    high: float = np.nan
    nans: int = 0
    negatives: int = 0
    contrasts: tuple[float, ...] = ()  # with each of LEVELS, from 0 to 1; empty: opaque


def of_facts(facts: dict[str, Any]) -> Tones:
    """Remove the tones from an artifact's facts and return them."""
    return Tones(**facts.pop("tones", {}))


def measured(values: Values) -> Seen:
    """Measure a deep image's values (H, W)."""
    numbers = values[np.isfinite(values)]
    nans = values.size - numbers.size
    if not numbers.size:
        return Seen(nans=nans)
    low = float(np.quantile(numbers, DARKEST, method="higher"))
    high = float(np.quantile(numbers, BRIGHTEST, method="lower"))
    return Seen(low, high, nans, int((numbers < 0).sum()))


def contrasts(grey: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> tuple[float, ...]:
    """Return the contrast of an image's visible parts with each background; both are (H, W).

    Empty if no pixel is transparent, or none is visible.
    """
    weights = alpha.astype(np.float64)
    if alpha.min() == 255 or not weights.any():
        return ()
    off = [np.abs(grey.astype(np.float64) - level) / 255 for level in LEVELS.values()]
    return tuple(float(np.average(of, weights=weights)) for of in off)


def range_of(seen: Sequence[Seen]) -> tuple[float, float]:
    """Return the range of a data set: robust percentiles over its training images."""
    lows = [one.low for one in seen if np.isfinite(one.low)]
    highs = [one.high for one in seen if np.isfinite(one.high)]
    if not lows:
        return 0.0, 1.0
    low, high = float(np.percentile(lows, LOWEST)), float(np.percentile(highs, HIGHEST))
    return (low, high) if high > low else (low, low + 1)


def given_range(text: str) -> tuple[float, float] | None:
    """Read the param `prepare.range`: None for auto, else two numbers.

    Raises ParamError for anything else.
    """
    if text == AUTO:
        return None
    parts = re.fullmatch(r"\s*(\S+?)\s*\.\.\s*(\S+)\s*", text)
    try:
        low, high = (float(part) for part in parts.groups()) if parts else (0.0, 0.0)
    except ValueError:
        low = high = 0.0
    if not -np.inf < low < high < np.inf:
        raise ParamError(
            f"params.yaml: prepare.range = {text!r}: expected auto, or two numbers such as 0..4095"
        )
    return low, high


def background_of(seen: Sequence[Seen]) -> Background:
    """Return the background on which the fewest images are invisible; white if few are on it."""
    clear = np.array([one.contrasts for one in seen if one.contrasts])
    if not len(clear):
        return "white"
    hidden = (clear < HIDDEN).mean(0)
    names: tuple[Background, ...] = get_args(Background)
    return "white" if hidden[0] <= MOST_HIDDEN else names[int(hidden.argmin())]


def eight_bits(values: Values, tones: Tones) -> tuple[NDArray[np.uint8], float]:
    """Scale values (H, W) to 8 bits; return them and the clipped share. NaN becomes black."""
    assert tones.low is not None
    assert tones.high is not None
    scaled = (values - tones.low) * (255 / (tones.high - tones.low))
    beyond = ~((scaled > -0.5) & (scaled < 255.5))
    scaled = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0)
    return scaled.round().clip(0, 255).astype(np.uint8), float(beyond.mean())
