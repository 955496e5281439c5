"""A hundred damaged and odd image files: each is read right, or refused by its name."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from conftest import read_params, run
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from test_prepare import read_index, read_json

from pipeline.dataset.decode import decode, header
from pipeline.stage_runtime.errors import DataError

SIZE = 32
Pixels = NDArray[np.uint8]
Odd = tuple[str, bytes, Pixels | None]  # name, content, what it shows; None: to be refused


def picture(width: int = 64, height: int = 64) -> Image.Image:
    """A smooth picture with another colour in every corner, so that a turn shows."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return Image.fromarray((np.stack([x, y, 1 - x * y], 2) * 255).astype(np.uint8))


def saved(image: Image.Image, kind: str, **how: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)  # type: ignore[arg-type]
    return out.getvalue()


def shown(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def formats() -> list[Odd]:
    """One picture in every format, quality and mode that holds it."""
    p = picture()
    grey = p.convert("L")
    kinds: list[tuple[str, Image.Image, str, dict[str, object]]] = [
        ("a.jpg", p, "JPEG", {"quality": 98}),
        ("b.JPG", p, "JPEG", {"quality": 98, "progressive": True}),
        ("c.JpEg", p, "JPEG", {"quality": 98, "subsampling": 0, "optimize": True}),
        ("d.png", p, "PNG", {}),
        ("e.PNG", p, "PNG", {"compress_level": 0}),
        ("f.bmp", p, "BMP", {}),
        ("g.ppm", p, "PPM", {}),
        ("h.tif", p, "TIFF", {}),
        ("i.tiff", p, "TIFF", {"compression": "tiff_lzw"}),
        ("j.tif", p, "TIFF", {"compression": "tiff_deflate"}),
        ("k.webp", p, "WEBP", {"lossless": True}),
        ("l.webp", p, "WEBP", {"quality": 95}),
        ("m.jpg", grey, "JPEG", {"quality": 98}),
        ("n.png", grey, "PNG", {}),
        ("o.pgm", grey, "PPM", {}),
        ("p.bmp", grey, "BMP", {}),
        ("q.tif", grey, "TIFF", {}),
        ("cmyk.jpg", p.convert("CMYK"), "JPEG", {"quality": 98}),
        ("cmyk.tif", p.convert("CMYK"), "TIFF", {}),
        ("ycbcr.tif", p.convert("YCbCr"), "TIFF", {}),
        ("alpha.png", p.convert("RGBA"), "PNG", {}),
        ("alpha.webp", p.convert("RGBA"), "WEBP", {"lossless": True}),
        ("alpha.tif", p.convert("RGBA"), "TIFF", {}),
        ("grey alpha.png", grey.convert("LA"), "PNG", {}),
        ("palette.png", p.quantize(256), "PNG", {}),
        ("palette.bmp", p.quantize(256), "BMP", {}),
        ("few colours.png", p.quantize(4), "PNG", {}),
        ("one bit.png", grey.convert("1"), "PNG", {}),
        ("one bit.tif", grey.convert("1"), "TIFF", {"compression": "group4"}),
        ("png named.jpg", p, "PNG", {}),
        ("jpeg named.png", p, "JPEG", {"quality": 98}),
        ("gif named.png", p.quantize(256), "GIF", {}),
    ]
    return [(name, saved(im, kind, **how), shown(im)) for name, im, kind, how in kinds]


def deep() -> list[Odd]:
    """Sixteen bits and floats among pictures of eight, and a profile and texts beside pixels."""
    grey = np.asarray(picture().convert("L"))
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "x" * 100_000, zip=True)
    return [
        ("sixteen.png", saved(wide, "PNG"), None),
        ("sixteen.tif", saved(wide, "TIFF"), None),
        ("float.tif", saved(Image.fromarray(grey.astype(np.float32)), "TIFF"), None),
        ("unit float.tif", saved(Image.fromarray(grey / np.float32(255)), "TIFF"), None),
        ("texts.png", saved(picture(), "PNG", pnginfo=texts), shown(picture())),
    ]


def shapes() -> list[Odd]:
    found = []
    for width, height in ((1, 1), (1, 300), (300, 1), (2, 3), (4000, 3), (3000, 2000), (33, 31)):
        im = picture(width, height)
        found.append((f"{width} x {height}.png", saved(im, "PNG"), shown(im)))
    return found


def turned() -> list[Odd]:
    """Each EXIF orientation of a picture that shows upright, in two formats."""
    upright = picture(96, 48)
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    found = []
    for orientation, how in back.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind, suffix in (("JPEG", "jpg"), ("PNG", "png")):
            content = saved(upright.transpose(how), kind, exif=exif)
            found.append((f"turned {orientation}.{suffix}", content, shown(upright)))
    for orientation in (0, 9):  # no orientations: taken as they are
        exif = Image.Exif()
        exif[0x0112] = orientation
        name = f"turned {orientation}.jpg"
        found.append((name, saved(upright, "JPEG", exif=exif), shown(upright)))
    return found


def several() -> list[Odd]:
    p, q = picture(), picture().transpose(Image.Transpose.ROTATE_180)
    more = {"save_all": True, "append_images": [q]}
    return [
        ("animated.png", saved(p, "PNG", **more), None),
        ("animated.webp", saved(p, "WEBP", **more), None),
        ("pages.tif", saved(p, "TIFF", **more), None),
        ("animated gif named.png", saved(p.quantize(64), "GIF", **more), None),
        ("telephone.jpg", saved(p, "MPO", quality=95, **more), shown(p)),
    ]


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def damaged() -> list[Odd]:
    p = picture()
    found: list[Odd] = [
        ("empty.jpg", b"", None),
        ("text.png", b"not an image", None),
        ("page.jpg", b"<html><body>404 Not Found</body></html>", None),
        ("zeros.bmp", bytes(5000), None),
        ("svg.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', None),
        ("pdf.jpg", b"%PDF-1.4\n", None),
        ("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", None),
        ("huge.png", png_of(100_000, 100_000), None),
        ("large.png", png_of(20_000, 20_000), None),
        ("no size.png", png_of(0, 0), None),
        ("too little.png", png_of(500, 500), None),
        ("negative.ppm", b"P6 -5 5 255\n" + bytes(75), None),
        ("huge.ppm", b"P6 99999 99999 255\n" + bytes(75), None),
    ]
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("BMP", "bmp"), ("PPM", "ppm")):
        whole = saved(p, kind)
        found += [
            (f"cut {share}.{suffix}", whole[: len(whole) * share // 100], None)
            for share in (1, 10, 50, 90)
        ]
    for kind, suffix in (("WEBP", "webp"), ("TIFF", "tif")):
        whole = saved(p, kind)
        found += [
            (f"cut {share}.{suffix}", whole[: len(whole) * share // 100], None)
            for share in (1, 20, 50)
        ]
    whole = bytearray(saved(p, "PNG"))
    whole[len(whole) // 2] ^= 0xFF  # its checksum tells
    return [*found, ("one byte off.png", bytes(whole), None)]


ODD = [*formats(), *deep(), *shapes(), *turned(), *several(), *damaged()]


def test_there_are_a_hundred_of_them():
    assert len(ODD) >= 100
    assert len({name for name, _, _ in ODD}) == len(ODD)


@pytest.mark.parametrize(("name", "content", "expected"), ODD, ids=[name for name, _, _ in ODD])
def test_an_odd_image_is_read_right_or_refused_by_name(tmp_path, name, content, expected):
    file = tmp_path / name
    file.write_bytes(content)
    if expected is None:
        with pytest.raises(DataError) as refused:
            decode(file, SIZE, "squash", 3)
        assert str(refused.value).startswith(f"{file}: ")
        assert "\n" not in str(refused.value)
        return
    found = decode(file, SIZE, "squash", 3)
    assert found.shape == (SIZE, SIZE, 3)
    # Lossy formats, and four inks, move a value by a few steps; a turned picture by hundreds.
    assert np.abs(found.astype(int) - expected).mean() < 4
    assert header(file).grey == (Image.open(file).mode in ("1", "L", "LA", "I;16", "F"))


def test_prepare_accounts_for_every_one_of_them(tmp_path):
    for label in ("a", "b"):
        for name, content, _ in ODD:
            file = tmp_path / "photos" / label / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    params = read_params(
        prepare={"path": str(tmp_path / "photos"), "not_images": "skip", "size": 16}
    )
    run(tmp_path, params, "prepare")
    refused = {f"{label}/{name}" for label in "ab" for name, _, shows in ODD if shows is None}
    assert set(read_json(tmp_path, "audit.json")["skipped_unreadable"]) == refused
    kept = {f"{label}/{name}" for label in "ab" for name, _, shows in ODD if shows is not None}
    assert {row["path"] for row in read_index(tmp_path)} == kept


def mutated(content: bytes, seed: int) -> bytes:
    random = np.random.default_rng(seed)
    changed = bytearray(content)
    for place in random.integers(0, len(changed), 1 + seed % 8):
        changed[place] = int(random.integers(0, 256))
    return bytes(changed)


MAKE: dict[str, Callable[[], bytes]] = {
    "jpg": lambda: saved(picture(), "JPEG"),
    "png": lambda: saved(picture(), "PNG"),
    "tif": lambda: saved(picture(), "TIFF", compression="tiff_lzw"),
    "webp": lambda: saved(picture(), "WEBP"),
    "bmp": lambda: saved(picture().quantize(16), "BMP"),
}


@pytest.mark.parametrize("suffix", MAKE)
def test_a_mutated_file_is_decoded_or_refused_and_nothing_else(tmp_path, suffix):
    content, file = MAKE[suffix](), tmp_path / f"a.{suffix}"
    refused = 0
    for seed in range(200):
        file.write_bytes(mutated(content, seed))
        try:
            assert decode(file, SIZE, "pad", 3).shape == (SIZE, SIZE, 3)
        except DataError:
            refused += 1
    assert refused < 200
