"""From a file to pixels: decoded once, upright, square, 8 bits."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from pipeline.errors import DataError
from pipeline.images.pack import Fit, Pixels

# A picture may claim any size in its header; Pillow warns from here on and refuses only later.
MOST_PIXELS = 89_478_485
Image.MAX_IMAGE_PIXELS = None  # its own check: ours replaces it, in one line

GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "F"})


class Header(NamedTuple):
    """What a file says of itself before it is decoded."""

    grey: bool
    short: int  # pixels of the shorter side
    long: int


def header(file: Path) -> Header:
    """Read an image's header.

    Raises DataError if Pillow can't identify the file.
    """
    with _opened(file) as image:
        return Header(image.mode in GREY_MODES, *sorted(image.size))


def decode(file: Path, size: int, fit: Fit, channels: int) -> Pixels:
    """Decode an image, turn it upright by its EXIF orientation and fit it to a square.

    `squash` changes the aspect ratio, `crop` keeps the middle square, `pad` adds black borders.
    Transparent parts become white. Returns uint8, (H, W) for one channel, else (H, W, 3).

    Raises DataError naming the file if it can't be read as an image.
    """
    with _opened(file) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            flat = _flat(upright, "L" if channels == 1 else "RGB")
            return np.asarray(_fitted(flat, (size, size), fit))
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
        image = Image.open(file)
    except Exception as error:
        raise DataError(f"{file}: can't be read as an image ({_said(error)})") from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        image.close()
        raise DataError(f"{file}: claims {width} x {height} pixels; make it smaller")
    try:
        # A telephone's MPO is a JPEG with more pictures behind it that no viewer shows.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception as error:  # counting them reads on
        image.close()
        raise DataError(f"{file}: can't be read as an image ({_said(error)})") from None
    if frames > 1:
        image.close()
        raise DataError(f"{file}: holds {frames} pictures; keep one in a file of its own")
    return image


def _flat(image: Image.Image, mode: Literal["L", "RGB"]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit and float grey to 8 bits; Pillow's own `convert` would clip at 255."""
    values = np.asarray(image).astype(np.float64)
    top = 65535.0
    if image.mode == "F":
        top = 1.0 if values.max(initial=0) <= 1 else 255.0
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
