"""Sources: CSV files, archives and URLs against the same images in a plain folder."""

import hashlib
import inspect
import io
import os
import shutil
import struct
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import write_photos
from test_prepare import HYMENOPTERA, prepared, splits_by

from pipeline.dataset import sources
from pipeline.dataset.torchvision_sets import SETS
from pipeline.images.shards import read_images
from pipeline.nets.torchvision_import import torchvision
from pipeline.stage_runtime.errors import DataError, ParamError

LABELS = ("class0", "class1")


def write_table(folder: Path, rows: list[str], header: str = "path,label") -> Path:
    write_photos(folder)
    (folder / "mine.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return folder


def all_rows(each: int = 16) -> list[str]:
    return [f"{label}/{i:03d}.png,{label}" for label in LABELS for i in range(each)]


def test_a_csv_file_gives_what_its_folders_would(tmp_path, photos):
    table = write_table(tmp_path / "table", all_rows())
    expected = prepared(tmp_path / "a", path=str(photos))
    found = prepared(tmp_path / "b", source="csv", path=str(table))
    assert found == expected
    for split in ("train", "val", "test"):
        first, second = (read_images(tmp_path / f / "prepared", split)[:] for f in "ab")
        assert np.array_equal(first, second)


def test_a_csv_files_splits_groups_and_weights_are_kept(tmp_path, capsys):
    rows = []
    for label in LABELS:
        for i in range(14):  # two images a class stay out
            split = "Test" if i < 4 else ""
            rows.append(f"{label}/{i:03d}.png,{label}s,{split},g{i // 2},{0.5 if i else 2},more")
    table = write_table(tmp_path / "table", rows, "path,label,split,group,weight,note")
    found = prepared(tmp_path, source="csv", path=str(table), split_by="group")
    by_path = {row["path"]: row for row in found}
    assert len(found) == 28
    assert {row["label"] for row in found} == {"class0s", "class1s"}
    assert {p for p, r in by_path.items() if r["split"] == "test"} == {
        f"{label}/{i:03d}.png" for label in LABELS for i in range(4)
    }
    assert by_path["class0/000.png"]["weight"] == "2.0"
    assert by_path["class1/007.png"]["weight"] == "0.5"
    assert {1} == {len(splits) for splits in splits_by(found, "group").values()}
    assert by_path["class0/006.png"]["group"] == by_path["class1/007.png"]["group"]
    assert "in no line, so not used: 4 images (class0/014.png, ...)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("header", "row", "said"),
    [
        (
            "file,label",
            "a,b",
            "no column 'path'; set prepare.columns: \"path=file, label=label\" .it has file, label",
        ),
        (
            "path,labels",
            "a,b",
            "no column 'label'; set prepare.columns: \"path=path, label=labels\" .it has",
        ),
        ("path,label", "../secret.png,b", "mine.csv:2: path '../secret.png' isn't relative"),
        ("path,label", "/etc/passwd,b", "mine.csv:2: path '/etc/passwd' isn't relative"),
        ("path,label", ",b", "mine.csv:2: path '' isn't relative"),
        ("path,label", "class0/999.png,b", "mine.csv:2: no file"),
        ("path,label", "class0/000.png,", "mine.csv:2: class0/000.png has no label"),
        ("path,label", "class0/000.png", "mine.csv:2: 1 cells, the header has 2"),
        ("path,label", "class0/000.png,a,b", "mine.csv:2: 3 cells, the header has 2"),
        ("path,label", "CLASS0/000.png,a", "no file .*; did you mean class0/000.png?"),
        ("path,label", "class0/000.jpg,a", "no file .*; did you mean class0/000.png?"),
        ("path,label", "000,a", "'000' matches 2 files .class0/000.png, class1/000.png."),
        ("path,label", "class0/000,a\nclass0/000.png,b", "lists class0/000.png more than once"),
        ("path,label,LABEL", "class0/000.png,a,b", "2 columns 'label'; keep one"),
        ("class0/000.png,a", "class1/000.png,b", "no header: its first line names a file"),
        ("path,label", 'class0/000.png,"a', "can't be read as CSV"),
        (
            "path,label,split",
            "class0/000.png,a,tset",
            "mine.csv:2: split 'tset'; did you mean test",
        ),
        (
            "path,label,weight",
            "class0/000.png,a,-1",
            "mine.csv:2: weight '-1' is not a number above 0",
        ),
        ("path,label,weight", "class0/000.png,a,nan", "weight 'nan' is not a number above 0"),
        ("path,label", "class0/000.png,a\nclass0/000.png,b", "lists class0/000.png more than once"),
    ],
)
def test_a_csv_line_that_cant_be_used_is_named(tmp_path, header, row, said):
    folder = write_photos(tmp_path / "table", each=1)
    (folder / "mine.csv").write_bytes(f"{header}\n{row}\n".encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=said.replace(".png", "[.]png").replace("?", "[?]")):
        prepared(tmp_path, source="csv", path=str(folder))


def test_one_csv_file_and_no_other_number(tmp_path, photos):
    with pytest.raises(DataError, match="no CSV file here"):
        prepared(tmp_path, source="csv", path=str(photos))


# Archives


def packed(folder: Path, archive: Path, top: str = "") -> Path:
    """Pack a folder's files, below a folder `top` if given."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    names = [str(Path(top) / file.relative_to(folder)) for file in files]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as content:
            for file, name in zip(files, names, strict=True):
                content.write(file, name)
    else:
        with tarfile.open(archive, f"w:{archive.suffix[1:].replace('tgz', 'gz')}") as content:
            for file, name in zip(files, names, strict=True):
                content.add(file, name)
    return archive


@pytest.mark.parametrize("name", ["set.zip", "SET.tgz", "set.tar.xz"])
@pytest.mark.parametrize("top", ["", "my photographs"])
def test_an_archive_is_the_folder_it_holds(tmp_path, photos, name, top):
    archive = packed(photos, tmp_path / name.lower(), top).rename(tmp_path / name)
    assert prepared(tmp_path, path=str(archive)) == prepared(tmp_path / "b", path=str(photos))


def evil_zip(file: Path, name: str, content: bytes = b"x") -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr(name, content)


def evil_tar(file: Path, name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    with tarfile.open(file, "w") as out:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, link, 1 if kind == tarfile.REGTYPE else 0
        out.addfile(member, io.BytesIO(b"x"))


def test_a_tar_of_the_folder_itself_is_taken(tmp_path, photos):
    """`tar -C folder .` names the folder `.` in its first entry."""
    with tarfile.open(tmp_path / "set.tar", "w") as content:
        content.add(photos, ".")
    found = prepared(tmp_path, path=str(tmp_path / "set.tar"))
    assert found == prepared(tmp_path / "b", path=str(photos))


EVIL = {
    "up.zip": (lambda f: evil_zip(f, "../out.png"), "would be written outside"),
    "root.zip": (lambda f: evil_zip(f, "/tmp/out.png"), "would be written outside"),
    "back.zip": (lambda f: evil_zip(f, "..\\out.png"), "would be written outside"),
    "drive.zip": (lambda f: evil_zip(f, "C:\\out.png"), "would be written outside"),
    "bomb.zip": (lambda f: evil_zip(f, "a.png", bytes(50_000_000)), "its content exceeds"),
    "text.zip": (lambda f: f.write_text("hello"), "damaged, or not a zip or tar"),
    "empty.tar": (lambda f: f.write_bytes(b""), "damaged, or not a zip or tar"),
    "up.tar": (lambda f: evil_tar(f, "a/../../out.png"), "would be written outside"),
    "link.tar": (lambda f: evil_tar(f, "a", tarfile.SYMTYPE, "/etc"), "a is a link or device"),
    "hard.tar": (lambda f: evil_tar(f, "a", tarfile.LNKTYPE, "/etc/passwd"), "is a link or device"),
    "pipe.tar": (lambda f: evil_tar(f, "a", tarfile.FIFOTYPE), "is a link or device"),
}


@pytest.mark.parametrize("name", EVIL)
def test_an_archive_that_isnt_to_be_trusted_writes_nothing(tmp_path, name):
    make, said = EVIL[name]
    make(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}.*{said}"):
        prepared(tmp_path, path=str(tmp_path / name))
    written = {f for f in tmp_path.rglob("*") if f.is_file() and not f.name.endswith(".lock")}
    assert written == {tmp_path / name}


def test_half_an_archive_is_refused_and_the_whole_one_then_taken(tmp_path, photos):
    archive = packed(photos, tmp_path / "set.zip")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"set\.zip: damaged"):
        prepared(tmp_path, path=str(archive))
    archive.write_bytes(whole)
    assert len(prepared(tmp_path, path=str(archive))) == 32


# A server on loopback


@dataclass
class Served:
    """One file on a server that can cut an answer off, and what was asked of it."""

    content: bytes = b""
    cut_after: int | None = None
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[Served]:
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/set.zip":
                self.send_error(404)
                return
            asked = self.headers.get("Range")
            served.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            body = served.content[start:]
            if asked and not body:
                self.send_error(416)
                return
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: served.cut_after])

        def log_message(self, *args: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    served.url = f"http://127.0.0.1:{http.server_address[1]}/set.zip"
    yield served
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def zipped(tmp_path: Path, photos: Path, server: Served) -> Served:
    server.content = packed(photos, tmp_path / "set.zip").read_bytes()
    return server


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_url_is_fetched_once(tmp_path, photos, zipped):
    digest = sha256(zipped.content)
    expected = prepared(tmp_path / "a", path=str(photos))
    assert prepared(tmp_path / "b", url=zipped.url, sha256=digest) == expected
    assert prepared(tmp_path / "c", url=zipped.url, sha256=digest) == expected
    assert zipped.ranges == [None]


def test_a_download_that_was_cut_off_goes_on_where_it_ended(tmp_path, zipped):
    zipped.cut_after = 200_000
    with pytest.raises(DataError, match=r"can't be fetched .*; run again to resume"):
        prepared(tmp_path, url=zipped.url, sha256=sha256(zipped.content))
    zipped.cut_after = None
    assert len(prepared(tmp_path, url=zipped.url, sha256=sha256(zipped.content))) == 32
    assert zipped.ranges == [None, "bytes=196608-"]


def test_a_file_that_changed_while_it_was_cut_off_is_fetched_anew(tmp_path, zipped):
    right, zipped.content = zipped.content, bytes(len(zipped.content))
    zipped.cut_after = 200_000
    with pytest.raises(DataError, match="can't be fetched"):
        prepared(tmp_path, url=zipped.url, sha256=sha256(right))
    zipped.content, zipped.cut_after = right, None
    assert len(prepared(tmp_path, url=zipped.url, sha256=sha256(right))) == 32
    assert zipped.ranges == [None, "bytes=196608-", None]


def test_a_url_needs_its_hash_and_only_that_file_is_taken(tmp_path, zipped):
    digest = sha256(zipped.content)
    with pytest.raises(DataError, match=f"prepare.sha256 is empty; set it to {digest}"):
        prepared(tmp_path, url=zipped.url)
    with pytest.raises(DataError, match=f"its SHA-256 is {digest}, not {'0' * 64}; correct prep"):
        prepared(tmp_path, url=zipped.url, sha256="0" * 64)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("{}/../none.zip", "can't be fetched .404"),
        ("http://127.0.0.1:9/set.zip", "can't be fetched"),
        ("file:///etc/set.zip", "expected http"),
        ("{}/../page.html", "expected http"),
    ],
)
def test_a_url_that_gives_nothing_is_named(tmp_path, server, url, said):
    url = url.format(server.url).replace("/set.zip/..", "")
    with pytest.raises(DataError, match=f"{url}.*{said}"):
        prepared(tmp_path, url=url, sha256="0" * 64)


# Ants and bees


@pytest.mark.skipif(not HYMENOPTERA.is_dir(), reason="no copy of the ants and bees at hand")
def test_ants_and_bees_come_from_a_copy_or_from_the_net_and_are_checked(
    tmp_path, server, monkeypatch
):
    here = prepared(
        tmp_path / "a",
        source="hymenoptera",
        path=str(HYMENOPTERA),
        not_images="skip",
        val_as="test",
        size=16,
    )
    assert {len([r for r in here if r["split"] == "test"])} == {153}
    top = "hymenoptera_data"
    server.content = packed(HYMENOPTERA, tmp_path / "set.zip", top).read_bytes()
    monkeypatch.setattr(sources, "HYMENOPTERA_URL", server.url)
    there = prepared(
        tmp_path / "b", source="hymenoptera", not_images="skip", val_as="test", size=16
    )
    assert there == here
    copy = shutil.copytree(HYMENOPTERA, tmp_path / "copy")
    (copy / "val" / "bees").chmod(0o755)  # as it may be where the copy comes from
    os.remove(next((copy / "val" / "bees").iterdir()))
    with pytest.raises(DataError, match="not the 397 photographs of the tutorial, but 396"):
        prepared(tmp_path / "c", source="hymenoptera", path=str(copy), not_images="skip")


# Sets of torchvision


def write_idx(file: Path, array: np.ndarray) -> None:
    """Write LeCun's format: a magic number with the dimensions, their sizes, the bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(struct.pack(">I", n) for n in array.shape)
    file.write_bytes(struct.pack(">I", 0x0800 + array.ndim) + sizes + array.tobytes())


def test_a_set_of_torchvision_comes_from_a_copy_of_its_files(tmp_path):
    random = np.random.default_rng(0)
    raw = tmp_path / "mine" / "FashionMNIST" / "raw"
    pixels, labels = {}, {}
    for split, part, each in (("train", "train", 9), ("test", "t10k", 3)):
        labels[split] = np.repeat(np.arange(10, dtype=np.uint8), each)
        pixels[split] = random.integers(0, 256, (10 * each, 28, 28)).astype(np.uint8)
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels[split])
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels[split])
    changes = {"source": "torchvision/FashionMNIST", "path": str(tmp_path / "mine"), "size": 28}
    rows = prepared(tmp_path, **changes)
    assert Counter(row["split"] for row in rows) == {"train": 68, "val": 22, "test": 30}
    assert len({row["label"] for row in rows}) == 10
    assert {row["label"] for row in rows} >= {"T-shirt-top", "Ankle boot"}
    found = read_images(tmp_path / "prepared", "test")[:]
    test = [row for row in rows if row["split"] == "test"]
    for row, image in zip(test, found, strict=True):
        number = int(Path(row["path"]).stem)
        assert np.array_equal(image, pixels["test"][number])
        names = torchvision.datasets.FashionMNIST.classes
        assert row["label"] == names[labels["test"][number]].replace("/", "-")


def test_a_set_of_torchvision_with_splits_by_name(tmp_path):
    for number, split in enumerate(("train", "valid", "test")):
        write_photos(tmp_path / "mine" / "country211" / split, each=6, first=6 * number)
    rows = prepared(tmp_path, source="torchvision/Country211", path=str(tmp_path / "mine"))
    assert Counter(row["split"] for row in rows) == {"train": 12, "val": 12, "test": 12}


def test_every_set_listed_is_one_of_torchvision_and_takes_those_arguments():
    for name, splits in SETS.items():
        signature = inspect.signature(getattr(torchvision.datasets, name).__init__).parameters
        for arguments in splits.values():
            if name not in ("EMNIST", "QMNIST"):  # hand theirs on to MNIST
                assert set(arguments) <= set(signature), name


def test_a_set_of_torchvision_that_cant_be_had_is_named(tmp_path):
    with pytest.raises(ParamError, match="did you mean torchvision/CIFAR10"):
        prepared(tmp_path, source="torchvision/CIFAR1O")
    with pytest.raises(ParamError, match=r"prepare\.source = 'foldr': did you mean folder"):
        prepared(tmp_path, source="foldr")
    with pytest.raises(DataError, match=r"torchvision/EuroSAT: can't be fetched .*; put its files"):
        prepared(tmp_path, source="torchvision/EuroSAT")
