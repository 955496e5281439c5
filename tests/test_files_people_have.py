"""Files and names as they come: other formats, odd entries of folders, names in any encoding."""

import io
import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, paths, write_photos
from PIL import Image
from test_prepare import prepared, read_json
from test_sources import packed

from pipeline.dataset import formats, sources
from pipeline.dataset.decode import decode, header
from pipeline.stage_runtime.errors import DataError
from pipeline.stage_runtime.files import walk

ONE = Image.new("RGB", (40, 40), "teal")


def content(kind: str) -> bytes:
    out = io.BytesIO()
    ONE.save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jfif", "JPEG"), ("a.jpe", "JPEG"), ("a.JPG", "JPEG"), ("a", "PNG"), ("a.gif", "GIF"),
        ("a.avif", "AVIF"), ("a.jp2", "JPEG2000"), ("a.dib", "DIB"), ("a.ico", "ICO"),
        ("a.pcx", "PCX"), ("a.sgi", "SGI"), ("a.tga", "TGA"), ("a.dat", "WEBP"), ("a.img", "TIFF"),
        ("IMG_0001", "JPEG"), ("a.jpg_large", "JPEG"), ("a.qoi", "QOI"), ("a.dds", "DDS"),
    ],
)  # fmt: skip
def test_a_picture_is_known_by_its_content(photos, tmp_path, name, kind, capsys):
    (photos / "class0" / name).write_bytes(content(kind))
    rows = prepared(tmp_path, path=str(photos))
    assert f"class0/{name}" in {row["path"] for row in rows}
    by_content = Path(name).suffix.lower() not in formats.SUFFIXES
    said = f"pictures by their content: 1 {Path(name).suffix or 'without a suffix'}"
    assert (said in capsys.readouterr().out) == by_content


@pytest.fixture
def no_heic(monkeypatch):
    """As where pillow-heif isn't installed."""
    monkeypatch.setattr(formats, "known", lambda: tuple(set(formats.FORMATS) - {"HEIF"}))


def test_heic_is_read_where_its_package_is_installed(photos, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    png, heic = photos / "class0" / "000.png", photos / "class0" / "IMG_0001.HEIC"
    with Image.open(png) as picture:
        pillow_heif.from_pillow(picture).save(heic, quality=100)
    rows = prepared(tmp_path, path=str(photos))
    assert "class0/IMG_0001.HEIC" in {row["path"] for row in rows}
    off = decode(heic, 48, "squash", 1).astype(int) - decode(png, 48, "squash", 1)
    assert abs(off).mean() < 4  # its colours are stored at half the size, grey is whole


@pytest.mark.usefixtures("no_heic")
@pytest.mark.parametrize(
    ("name", "start", "what"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic", "a HEIC picture; convert it to PNG or JPEG (or `pip"),
        ("a.pdf", b"%PDF-1.7", "a PDF; convert it"),
        ("a.svg", b"<?xml version='1.0'?><svg/>", "an SVG drawing; convert it"),
        ("a.dcm", bytes(128) + b"DICM", "a DICOM file; convert it"),
        ("a.mp4", b"\0\0\0\x20ftypisom", "a video; convert it"),
        ("a.npy", b"\x93NUMPY\x01\0", "a NumPy array; convert it"),
        ("a.CR2", content("TIFF"), "a camera's raw picture; convert it"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0", "a PostScript drawing; convert it"),
        ("a.txt", b"notes", "not an image"),
        ("a", b"", "empty"),
    ],
)
def test_what_is_no_picture_is_named_by_what_it_is(photos, tmp_path, name, start, what):
    (photos / "class0" / name).write_bytes(start)
    with pytest.raises(DataError) as refused:
        prepared(tmp_path, path=str(photos))
    assert str(refused.value).startswith(f"{photos / 'class0' / name}: {what}")
    assert str(refused.value).endswith("or set prepare.not_images: skip")
    prepared(tmp_path, path=str(photos), not_images="skip")
    assert list(read_json(tmp_path, "audit.json")["skipped_not_images"]) == [f"class0/{name}"]


def test_postscript_is_never_run_whatever_it_is_called(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(DataError, match="cannot identify"):
        header(tmp_path / "a.png")


@pytest.mark.usefixtures("no_heic")
@pytest.mark.parametrize("held", [[], ["a.heic", "b.heic"]])
def test_a_class_without_an_image_is_refused_or_said(photos, tmp_path, held, capsys):
    (photos / "birds").mkdir()
    for name in held:
        (photos / "birds" / name).write_bytes(b"\0\0\0\x18ftypheic")
    why = "2 files, such as birds/a.heic: a HEIC picture" if held else "birds is empty"
    with pytest.raises(
        DataError, match=rf"no image of class 'birds' \({why}.*add some, remove its"
    ):
        prepared(tmp_path, path=str(photos))
    prepared(tmp_path, path=str(photos), not_images="skip")
    assert f"no class 'birds', as its folder holds no image ({why}" in capsys.readouterr().out


def test_an_empty_folder_of_a_split_or_group_is_no_class(tmp_path):
    write_photos(tmp_path / "photos" / "train")
    (tmp_path / "photos" / "train" / "class0" / "later").mkdir()
    (tmp_path / "photos" / "test" / "class1").mkdir(parents=True)
    assert len(prepared(tmp_path, path=str(tmp_path / "photos"))) == 32


def test_an_unreadable_folder_is_refused_by_name(photos, tmp_path, monkeypatch):
    """Its class would be gone without a word. Root can read all, so the refusal is played."""
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).rstrip("/").endswith("class1"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(
        DataError, match=r"class1/?: can't be read \(Permission denied\); change its"
    ):
        prepared(tmp_path, path=str(photos))


def test_pipes_sockets_and_loops_neither_hang_nor_vanish(photos, tmp_path):
    os.mkfifo(photos / "class0" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(photos / "class0")
        listening.bind("sock.png")
        os.chdir(here)
        (photos / "class0" / "loop").symlink_to(photos / "class0", target_is_directory=True)
        (photos / "class1" / "self.png").symlink_to("self.png")
        (photos / "class1" / "gone.png").symlink_to("nowhere.png")
        (photos / "class2").symlink_to(photos / "class1", target_is_directory=True)
        with pytest.raises(DataError, match=r"no image of class 'class2' .* read already"):
            prepared(tmp_path, path=str(photos))
        rows = prepared(tmp_path, path=str(photos), not_images="skip")
    assert len(rows) == 32
    skipped = read_json(tmp_path, "audit.json")["skipped_not_images"]
    assert {path: said.partition(" (")[0] for path, said in skipped.items()} == {
        "class0/loop": "a link to a folder that is read already",
        "class0/pipe.png": "a named pipe",
        "class0/sock.png": "a device or socket",
        "class1/gone.png": "a link to nothing",
        "class1/self.png": "a link to nothing",
        "class2": "a link to a folder that is read already",
    }


def test_a_very_deep_folder_is_walked(tmp_path):
    deep = tmp_path
    for _ in range(400):
        deep = deep / "ab"
    deep.mkdir(parents=True)
    (deep / "x.png").touch()
    assert walk(tmp_path).files == ["/".join(["ab"] * 400) + "/x.png"]


# Names


@pytest.mark.parametrize(
    ("one", "other"),
    [("Cat", "cat"), ("cat", "cat "), ("gr\u00fcn", "gru\u0308n"), ("a b", "a  b"), ("ﬁg", "fig")],
)
def test_classes_that_look_the_same_are_refused_so_that_one_sees_it(tmp_path, one, other):
    write_photos(tmp_path / "photos")
    (tmp_path / "photos" / "class0").rename(tmp_path / "photos" / one)
    (tmp_path / "photos" / "class1").rename(tmp_path / "photos" / other)
    with pytest.raises(DataError) as refused:
        prepared(tmp_path, path=str(tmp_path / "photos"))
    said = str(refused.value)
    assert ascii(one) in said
    assert ascii(other) in said
    assert "differ only by case, blanks or Unicode form" in said


def zip_of(folder: Path, archive: Path, name: "dict[str, bytes]") -> Path:
    """Write a zip file whose names have the given bytes, without the mark of UTF-8."""
    with zipfile.ZipFile(archive, "w") as out:
        for i, file in enumerate(sorted(folder.rglob("*.png"))):
            label = file.parent.name
            out.write(file, f"{'Q' * len(name[label])}/{i}.png")
    content = archive.read_bytes()
    for label in sorted(name):
        numbers = [i for i, f in enumerate(sorted(folder.rglob("*.png"))) if f.parent.name == label]
        for i in numbers:
            old = f"{'Q' * len(name[label])}/{i}.png".encode()
            content = content.replace(old, name[label] + old[len(name[label]) :])
    archive.write_bytes(content)
    return archive


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "cp850", "cp437"])
def test_names_in_a_zip_are_read_as_they_were_meant(photos, tmp_path, encoding):
    names = {"class0": "Käfer".encode(encoding), "class1": "Blüten".encode(encoding)}
    archive = zip_of(photos, tmp_path / "set.zip", names)
    rows = prepared(tmp_path, path=str(archive))
    assert {row["label"] for row in rows} == {"Käfer", "Blüten"}


def test_backslashes_in_a_zip_are_folders(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as out:
        for file in photos.rglob("*.png"):
            member = zipfile.ZipInfo(f"a/{file.parent.name}/{file.name}")
            member.filename = member.orig_filename = f"set\\{file.parent.name}\\{file.name}"
            out.writestr(member, file.read_bytes())
    rows = prepared(tmp_path, path=str(tmp_path / "set.zip"))
    assert {row["label"] for row in rows} == {"class0", "class1"}


def test_a_folder_that_hides_the_classes_is_passed_over(photos, tmp_path):
    deep = tmp_path / "data" / "archive" / "PetImages"
    deep.parent.mkdir(parents=True)
    photos.rename(deep)
    archive = packed(deep.parent, tmp_path / "set.zip", "a/b/c")
    for place in (tmp_path / "data", archive):
        rows = prepared(tmp_path, path=str(place))
        assert {row["label"] for row in rows} == {"class0", "class1"}


def test_torchvisions_counts_are_ours(photos):
    assert len(sources.folder(photos).items) == 32


# predict


def command(*words: object, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "predict", *map(os.fsencode, map(str, words))],
        cwd=ROOT,
        capture_output=True,
        check=False,
        env={**os.environ, "COLUMNS": "40", **environment},
    )


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A folder with a name in Latin-1, an umlaut, a text, a pipe and a picture without suffix."""
    folder = tmp_path / "new"
    folder.mkdir()
    for name in (b"caf\xe9.png", "käse.png".encode(), b"plain"):
        (folder / os.fsdecode(name)).write_bytes(content("PNG"))
    (folder / "notes.txt").write_text("x")
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.mark.long
def test_all_of_a_folder_is_accounted_for_and_any_name_can_be_written(finished, strange, tmp_path):
    model = paths(finished)["evaluate"]["final"] / "model.safetensors"
    page = tmp_path / "page.html"
    done = command(strange, "--model", model, "--page", page)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert b"notes.txt" in done.stdout
    assert b"not an image" in done.stdout
    assert b"not a regular file" in done.stdout
    assert os.fsencode(strange) + b"/caf\xe9.png" in done.stdout  # the name's own bytes
    assert "caf\\xe9.png" in page.read_text(encoding="utf-8")
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = command(strange, "--model", model, **ascii_only)
    assert b"k\\xe4se.png" in done.stdout
    done = command(strange, "--model", model, "--json", **ascii_only)
    names = {Path(row["file"]).name for row in json.loads(done.stdout)}
    assert names == {"käse.png", "plain", "notes.txt", "pipe.png", "caf\udce9.png"}
    assert command(strange / "plain", "--model", model).returncode == 0


@pytest.mark.long
def test_a_reader_that_has_enough_gets_no_traceback(finished, strange):
    model = paths(finished)["evaluate"]["final"] / "model.safetensors"
    words = [sys.executable, "-m", "pipeline", "predict", strange, "--model", model]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()  # before it has written
        said = running.stderr.read()
    assert said == b""
    assert running.returncode == 141
