"""Decode image files to pixels: upright, square, 8 bits."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.dataset.formats import known, opened
from pipeline.images import tones as toned
from pipeline.images.shards import Fit, Pixels
from pipeline.images.tones import LEVELS, PLAIN, Seen, Tones
from pipeline.stage_runtime.errors import DataError

# A header may claim any size; Pillow warns from here on and refuses only larger ones.
MOST_PIXELS = 89_478_485

GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F"})
CLEAR_MODES = frozenset({"LA", "PA", "RGBA", "La", "RGBa"})
CLIPPED = 0.01  # share of an image's values outside the range above which it is reported
WHOLE = (0.0, 65535.0)  # the range of 16-bit colour, of which Pillow reads the upper byte


class Header(NamedTuple):
    """The properties of an image file that are known before it is decoded."""

    grey: bool
    short: int  # pixels of the shorter side
    long: int
    format: str = ""
    deep: bool = False  # more than 8 bits a value
    clear: bool = False  # may have transparent parts


class Decoded(NamedTuple):
    """An image as it is packed."""

    pixels: Pixels
    clipped: float  # the share of its values outside the data set's range


def header(file: Path) -> Header:
    """Read an image's header.

    Raises DataError if Pillow can't identify the file.
    """
    with _opened(file) as image:
        short, long = sorted(image.size)
        grey = image.mode in GREY_MODES or image.mode.startswith("I;")
        deep = _is_deep_grey(image) or _is_deep_colour(image)
        return Header(grey, short, long, image.format or "", deep, _is_clear(image))


def measured(file: Path) -> Seen:
    """Measure what the choice of a data set's range and background depends on.

    Raises DataError if the file can't be read as an image.
    """
    with _opened(file) as image:
        try:
            if _is_deep_grey(image):
                return toned.measured(_values(image))
            if _is_clear(image):
                grey, alpha = image.convert("RGBA").convert("LA").split()
                return Seen(contrasts=toned.contrasts(np.asarray(grey), np.asarray(alpha)))
            return Seen()
        except Exception as error:
            raise DataError(f"{file}: can't be read as an image ({_said(error)})") from None


def decode(file: Path, size: int, fit: Fit, channels: int, tones: Tones = PLAIN) -> Pixels:
    """Decode an image, turn it upright by its EXIF orientation and fit it to a square.

    `squash` changes the aspect ratio, `crop` keeps the middle square, `pad` adds black borders.
    `tones` set the conversion to 8 bits and the background of transparent parts. Returns uint8,
    (H, W) for one channel, else (H, W, 3).

    Raises DataError naming the file if it can't be read as an image, or has another bit depth.
    """
    return decoded(file, size, fit, channels, tones).pixels


def decoded(file: Path, size: int, fit: Fit, channels: int, tones: Tones) -> Decoded:
    """Decode an image like `decode`, and return the share of its values outside the range too."""
    with _opened(file) as image:
        _refuse_depth(file, image, tones)
        try:
            upright = ImageOps.exif_transpose(image)
            flat, clipped = _flat(upright, "L" if channels == 1 else "RGB", tones)
            return Decoded(np.asarray(_fitted(flat, (size, size), fit)), clipped)
        except Exception as error:  # Pillow raises anything from SyntaxError to struct.error
            raise DataError(f"{file}: can't be read as an image ({_said(error)})") from None


def _fitted(image: Image.Image, square: tuple[int, int], fit: Fit) -> Image.Image:
    if fit == "squash":
        return image.resize(square, Image.Resampling.BICUBIC)
    if fit == "crop":
        return ImageOps.fit(image, square, Image.Resampling.BICUBIC)
    return ImageOps.pad(image, square, Image.Resampling.BICUBIC)


def _opened(file: Path) -> Image.Image:
    try:
        image = opened(file, known())
    except Exception as error:
        raise DataError(f"{file}: can't be read as an image ({_said(error)})") from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        image.close()
        raise DataError(f"{file}: claims {width} x {height} pixels; make it smaller")
    try:
        # A phone's MPO is a JPEG followed by more images, which no viewer shows.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception as error:  # counting frames reads more of the file
        image.close()
        raise DataError(f"{file}: can't be read as an image ({_said(error)})") from None
    if frames > 1:
        image.close()
        raise DataError(f"{file}: holds {frames} pictures; keep one in a file of its own")
    return image


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _is_deep_colour(image: Image.Image) -> bool:
    """Return whether a colour image has 16 bits per channel; Pillow reads the upper eight."""
    if _is_deep_grey(image):
        return False
    for tile in getattr(image, "tile", ()):
        args = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(arg, str) and ";16" in arg for arg in args):
            return True
        if tile[0] == "ppm" and args[-1] > 255:
            return True
    return False


def _is_clear(image: Image.Image) -> bool:
    return image.mode in CLEAR_MODES or "transparency" in image.info


def _refuse_depth(file: Path, image: Image.Image, tones: Tones) -> None:
    """Refuse an image of another bit depth than its data set's: its values mean something else."""
    if _is_deep_colour(image):
        if (tones.low, tones.high) != WHOLE:
            raise DataError(
                f"{file}: has 16 bits a colour, of which the upper 8 can be read; set "
                "prepare.range: 0..65535 if the pictures fill that range, else convert them"
            )
    elif _is_deep_grey(image) and tones.low is None:
        raise DataError(
            f"{file}: has more than 8 bits a value, and the set's pictures have 8; convert it as "
            "they were"
        )
    elif not _is_deep_grey(image) and tones.low is not None:
        raise DataError(
            f"{file}: has 8 bits a value, and the set's pictures more ({tones.words}); take the "
            "original"
        )


def _flat(image: Image.Image, mode: str, tones: Tones) -> tuple[Image.Image, float]:
    clipped = 0.0
    if _is_deep_grey(image):
        values, clipped = toned.eight_bits(_values(image), tones)
        image = Image.fromarray(values)
    if _is_clear(image):
        image = image.convert("RGBA")
        level = LEVELS[tones.background]
        behind = Image.new("RGBA", image.size, (level, level, level, 255))
        image = Image.alpha_composite(behind, image)
    return image.convert(mode), clipped


def _values(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image).astype(np.float64)


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
