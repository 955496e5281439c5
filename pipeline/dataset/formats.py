"""Which files are images, by their content, and what other files are."""

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

from PIL import Image

# Still images that Pillow reads without running another program (it does for PostScript).
FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "FITS", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000"),
    *("MPO", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP"),
)
# Files with these suffixes count as images without being opened, which takes long for a million.
# Their format is still recognised by their content.
SUFFIXES = frozenset({
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".dib"),
    *(".tif", ".tiff", ".webp", ".avif", ".jp2", ".j2k", ".jpx", ".qoi", ".tga"),
})  # fmt: skip
# Raw formats of cameras are TIFFs whose first image is a small preview.
RAW = frozenset({
    *(".cr2", ".cr3", ".nef", ".nrw", ".arw", ".srf", ".dng", ".orf", ".rw2", ".raf", ".pef"),
    *(".srw", ".3fr", ".erf", ".kdc", ".raw"),
})  # fmt: skip
CONVERT = "convert it to PNG or JPEG"
KINDS = (
    (b"%PDF", 0, "a PDF"),
    (b"DICM", 128, "a DICOM file"),
    (b"ftyphei", 4, "a HEIC picture"),
    (b"ftypmif1", 4, "a HEIC picture"),
    (b"ftyphevc", 4, "a HEIC picture"),
    (b"ftyp", 4, "a video"),
    (b"\x1aE\xdf\xa3", 0, "a video"),
    (b"AVI ", 8, "a video"),
    (b"\x93NUMPY", 0, "a NumPy array"),
    (b"\x89HDF", 0, "an HDF5 file"),
    (b"v/1\x01", 0, "an OpenEXR picture"),
    (b"<svg", 0, "an SVG drawing"),
    (b"%!PS", 0, "a PostScript drawing"),
    (b"PK\x03\x04", 0, "an archive"),
    (b"\x1f\x8b", 0, "an archive"),
)


def suffix(file: str) -> str:
    """Return a file name's suffix, with its dot, in lower case."""
    return os.path.splitext(file)[1].lower()


@cache
def known() -> tuple[str, ...]:
    """Return the formats that can be read here, with HEIC if pillow-heif is installed."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def opened(file: Path | IO[bytes], kinds: list[str] | tuple[str, ...] | None = None) -> Image.Image:
    """Open an image of one of these formats, by its content; None allows all that Pillow reads.

    Pillow's own limit on pixels, which first only warns, is disabled: `decode` has one.
    """
    Image.MAX_IMAGE_PIXELS = None
    return Image.open(file, formats=kinds)


def what_else(file: Path) -> str:
    """Return what a file without an image suffix is; empty if it is an image after all."""
    if file.suffix.lower() in RAW:
        return f"a camera's raw picture; {CONVERT}"
    try:
        with file.open("rb") as content:
            start = content.read(1024)
    except OSError as error:
        return f"can't be read ({error.strerror})"
    if not start:
        return "empty"
    try:
        # Not TGA, which has no magic number.
        opened(file, [name for name in known() if name != "TGA"]).close()
    except Exception:
        text = b"<svg" if b"<svg" in start else start
        for magic, at, name in KINDS:
            if text[at : at + len(magic)] == magic:
                more = " (or `pip install pillow-heif`)" if "HEIC" in name else ""
                return f"{name}; {CONVERT}{more}"
        return "not an image"
    return ""
