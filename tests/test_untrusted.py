"""What comes from elsewhere, and may mean harm: refused in one line, with nothing done by it."""

import errno
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, STAGES, call, paths, read_params, write_photos
from PIL import Image
from repository import python_path

from pipeline.dataset import fetch
from pipeline.dataset.decode import header
from pipeline.final_model import classifier
from pipeline.images.shards import read_facts, read_images, read_rows
from pipeline.nets import checkpoint
from pipeline.nets.network import load
from pipeline.probing.probes import read_probes
from pipeline.stage_runtime.errors import CheckpointError, DataError, ParamError
from pipeline.stage_runtime.files import new_array, write_text
from pipeline.stage_runtime.schema import arguments
from pipeline.stage_runtime.schema import read_params as read_params_file
from pipeline.training.fit import EXPLODED, DivergedError


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("seed: 0\n" + "# x\n" * 300_000, "1,200,008 bytes; at most 100,000 are allowed"),
        ("a: " + "[" * 20_000, "not readable as YAML"),
        ("seed: !!python/object/apply:os.system ['touch executed']", "could not determine a const"),
        ("seed: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("seed: !include /etc/passwd", "could not determine a constructor for the tag"),
        ("seed: 2026-13-45", "not readable as YAML"),
        ("? [a, b]\n: 1", "not readable as YAML"),
        ("seed: 1\x00", "not readable as YAML"),
        ("seed: 0\nseed: 1", "'seed' occurs twice in one section"),
    ],
    ids=["a megabyte", "brackets", "call", "name", "include", "date", "key", "zero byte", "twice"],
)
def test_a_params_file_that_means_harm(content, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "params.yaml"
    file.write_text(content)
    with pytest.raises(ParamError) as caught:
        read_params_file(file)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["params.yaml"]


def test_aliases_that_multiply_are_refused_without_being_written_out(tmp_path):
    """A billion laughs: ten lists of ten of the list before."""
    lines = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "params.yaml").write_text("\n".join([*lines, "seed: *a11"]))
    params = {**read_params(), **read_params_file(tmp_path / "params.yaml")}
    with pytest.raises(ParamError, match="seed = ") as caught:
        arguments(STAGES["stage2"], params)
    assert len(str(caught.value)) < 500


def test_a_value_that_holds_itself_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_text("unfreeze: &a [*a]")
    params = read_params(stage1=read_params_file(tmp_path / "params.yaml"))
    with pytest.raises(ParamError, match=r"stage1\.unfreeze"):
        arguments(STAGES["stage1"], params)


# Images


def claiming(width: int, height: int) -> bytes:
    """Make a PNG of a few bytes that claims so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def claiming_text(length: int) -> bytes:
    """Make a PNG whose compressed text grows to so many bytes."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    text = b"Comment\0\0" + zlib.compress(bytes(length))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + text))
    data = file.getvalue()
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (claiming(100_000, 100_000), "huge.png: claims 100000 x 100000 pixels; make it smaller"),
        (claiming(2**31 - 1, 2**31 - 1), "huge.png: claims 2147483647 x 2147483647 pixels"),
        (claiming(0, 10), "huge.png: can't be read as an image"),
        (claiming_text(500_000_000), "huge.png: can't be read as an image"),
    ],
    ids=["100,000 x 100,000", "2 billion x 2 billion", "no pixels", "text that grows to 500 MB"],
)
def test_an_image_that_claims_to_be_huge(content, line, photos, tmp_path):
    (photos / "class1" / "huge.png").write_bytes(content)
    with pytest.raises(DataError) as caught:
        call("prepare", paths(tmp_path)["prepare"], read_params(prepare={"path": str(photos)}))
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("=cmd|' calc'!A0", "begins with '=', like a spreadsheet formula; rename it"),
        ("+1+1", "begins with '+'"),
        ("-2+3", "begins with '-'"),
        ("@SUM(1)", "begins with '@'"),
        ("red\x1b[2Jgreen", "contains control characters; rename it"),
        ("two\nlines", "contains control characters; rename it"),
        (b"latin\xe9".decode(errors="surrogateescape"), "contains bytes that are not UTF-8"),
    ],
    ids=["=cmd", "+1+1", "-2+3", "@SUM", "escape", "line break", "not UTF-8"],
)
def test_a_class_name_that_does_harm_where_it_is_read(name, line, photos, tmp_path):
    (photos / "class1").rename(photos / name)
    with pytest.raises(DataError) as caught:
        call("prepare", paths(tmp_path)["prepare"], read_params(prepare={"path": str(photos)}))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_may_be_called_by_a_negative_number(photos, tmp_path):
    (photos / "class1").rename(photos / "-1")
    call("prepare", paths(tmp_path)["prepare"], read_params(prepare={"path": str(photos)}))
    assert read_facts(tmp_path / "prepared").classes == ["-1", "class0"]
    # A spreadsheet would compute with -1/000.png.
    rows = read_rows(tmp_path / "prepared", "train")
    assert {path[:5] for path in rows.paths} == {"./-1/", "class"}
    assert all((photos / path).is_file() for path in rows.paths)


def test_a_formula_as_a_path_of_a_csv_file_is_refused(photos, tmp_path):
    (photos / "class1" / "000.png").rename(photos / "=1+1.png")
    (photos / "all.csv").write_text("path,label\n=1+1.png,a\nclass0/000.png,b\n")
    params = read_params(prepare={"path": str(photos), "source": "csv"})
    with pytest.raises(DataError, match=r"path '=1\+1.png' begins with '='"):
        call("prepare", paths(tmp_path)["prepare"], params)


def test_a_tar_bomb_is_refused_before_it_is_read_to_its_end(tmp_path, monkeypatch):
    def endless() -> Any:
        for i in range(10_000):
            info = tarfile.TarInfo(f"{i}.png")
            info.size = 10**12
            yield info

    monkeypatch.setattr(tarfile.TarFile, "__iter__", lambda self: endless())
    file = tmp_path / "bomb.tar"
    with tarfile.open(file, "w"):
        pass
    with pytest.raises(DataError, match="its content exceeds 2,048,000 bytes; not unpacked"):
        fetch.unpacked(file)


# What stages wrote, changed


def test_a_test_of_header_alone_needs_no_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(claiming(50, 60))
    assert (50, 60) == header(tmp_path / "a.png")[1:3]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("facts.json", b"{", "facts.json: damaged (JSONDecodeError"),
        ("facts.json", b"[]", "facts.json: damaged (TypeError"),
        ("facts.json", b'{"classes": []}', "facts.json: damaged (TypeError"),
        ("index.csv", b"id,path\n1,2\n", "index.csv: damaged (KeyError: 'split')"),
        ("index.csv", b"\xff\xfe", "index.csv: damaged (UnicodeDecodeError"),
        ("images/00000.npy", b"no array", "00000.npy: damaged (ValueError"),
        ("images/00000.npy", b"", "00000.npy: damaged (EOFError"),
    ],
)
def test_a_damaged_file_of_prepare_is_named(name, content, line, finished, tmp_path):
    prepared = shutil.copytree(paths(finished)["prepare"]["out"], tmp_path / "prepared")
    (prepared / name).write_bytes(content)
    read = read_images if name.startswith("images") else read_rows
    with pytest.raises(DataError) as caught:
        read(prepared, "train")
    assert line in str(caught.value)
    assert str(caught.value).endswith("; run `dvc checkout --force`")


def test_an_array_that_holds_objects_is_not_unpickled(finished, tmp_path):
    prepared = shutil.copytree(paths(finished)["prepare"]["out"], tmp_path / "prepared")
    np.save(prepared / "images/00000.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"00000\.npy: damaged"):
        read_images(prepared, "train")


def test_packed_images_of_another_shape_are_refused(finished, tmp_path):
    prepared = shutil.copytree(paths(finished)["prepare"]["out"], tmp_path / "prepared")
    np.save(prepared / "images/00000.npy", np.zeros((3, 9, 9), np.uint8))
    with pytest.raises(DataError, match=r"00000\.npy: damaged \(ValueError: uint8 of shape"):
        read_images(prepared, "train")


Spoil = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("name", "read", "spoil", "line"),
    [
        ("stage1", load, lambda m: m.update(backbone=3), "are inconsistent (TypeError"),
        ("stage1", load, lambda m: m["backbone"].pop("mean"), "(KeyError: 'mean')"),
        ("stage1", load, lambda m: m.update(precision="fp8"), "(KeyError: 'fp8')"),
        ("stage1", load, lambda m: m.pop("classes"), "holds no network (no 'classes')"),
        ("final", classifier.load, lambda m: m.pop("viewing"), "(KeyError: 'viewing')"),
        ("final", classifier.load, lambda m: m.update(n_outputs=-3), "metadata are inconsistent"),
        ("probe", read_probes, lambda m: m.update(winner=[]), "metadata are inconsistent"),
        ("probe", read_probes, lambda m: m.pop("linear"), "holds no probes"),
    ],
)
def test_a_checkpoint_whose_metadata_contradict_it(name, read, spoil, line, finished, tmp_path):
    file = finished / "models" / name / ("probe" if name == "probe" else "model")
    tensors, meta = checkpoint.read(file.with_suffix(".safetensors"))
    spoil(meta)
    other = tmp_path / "other.safetensors"
    checkpoint.write(other, tensors, meta)
    with pytest.raises(CheckpointError) as caught:
        read(other)
    assert line in str(caught.value)


def test_a_head_with_its_classes_in_another_order_is_refused(finished, tmp_path):
    tensors, meta = checkpoint.read(paths(finished)["stage2"]["stage1"])
    meta["classes"].reverse()
    other = tmp_path / "other.safetensors"
    checkpoint.write(other, tensors, meta)
    ways = {**paths(finished)["stage2"], "stage1": other, "out": tmp_path / "out"}
    with pytest.raises(CheckpointError, match=r"\['class1', 'class0'\] aren't those of the images"):
        call("stage2", ways, read_params())


def test_a_loss_that_explodes_stops_the_stage_before_it_is_no_number(finished, tmp_path):
    wild = {"optimizer": "sgd", "lr": 1e5, "schedule": "constant", "warmup_epochs": 0, "epochs": 9}
    ways = {**paths(finished)["stage1"], "out": tmp_path / "out"}
    with pytest.raises(DivergedError, match=r"epoch \d: the (validation )?loss is") as caught:
        call("stage1", ways, read_params(stage1={**wild, "unfreeze": []}))
    loss = float(str(caught.value).partition("loss is ")[2].split()[0])
    assert loss > EXPLODED or not np.isfinite(loss)


def test_a_class_that_validation_has_none_of_is_said(tmp_path, capsys):
    for number, split in enumerate(("train", "val", "test")):
        write_photos(tmp_path / "given" / split, each=8, first=8 * number)
    shutil.rmtree(tmp_path / "given" / "val" / "class1")
    params = read_params(prepare={"path": str(tmp_path / "given")})
    call("prepare", paths(tmp_path)["prepare"], params)
    assert "no class1 in val: how well it is recognised is not measured" in capsys.readouterr().out


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A disk of four megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_an_array_without_room_on_the_disk_is_refused_before_it_is_filled(small_disk):
    with pytest.raises(OSError, match="No space left") as caught:
        new_array(small_disk / "a.npy", np.uint8, (10_000_000,))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(small_disk / "a.npy")
    assert list(small_disk.iterdir()) == []


def test_a_file_without_room_on_the_disk_leaves_the_old_one(small_disk):
    write_text(small_disk / "a.txt", "old")
    with pytest.raises(OSError, match="No space left"):
        write_text(small_disk / "a.txt", "new" * 2_000_000)
    assert [p.name for p in small_disk.iterdir()] == ["a.txt"]
    assert (small_disk / "a.txt").read_text() == "old"


def test_a_stage_on_a_full_disk_ends_in_a_line_and_goes_on_with_room(small_disk, tmp_path, photos):
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump(read_params(prepare={"path": str(photos), "size": 256}))
    )
    words = [sys.executable, "-m", "pipeline", "prepare"]
    words += ["--out", f"{small_disk}/prepared", "--timing", f"{small_disk}/timing.json"]
    env = {**os.environ, "PYTHONPATH": python_path(ROOT), "PIPELINE_CACHE": f"{small_disk}/cache"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    line = "00000.npy: No space left on device; run the same command to resume; `git"
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (small_disk / "prepared").exists()
    assert not (small_disk / "prepared.part").exists()
    env["PIPELINE_CACHE"] = str(tmp_path / "roomy")
    words[words.index("--out") + 1] = str(tmp_path / "prepared")
    subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, check=True)


def test_a_folder_that_cannot_be_written_to_is_named(photos, tmp_path):
    """A file stands where the folder should be: no right is needed for that to fail."""
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump(read_params(prepare={"path": str(photos)}))
    )
    (tmp_path / "data").write_text("a file")
    words = [sys.executable, "-m", "pipeline", "prepare", "--out", "data/prepared"]
    env = {**os.environ, "PYTHONPATH": python_path(ROOT)}
    done = subprocess.run(
        [*words, "--timing", "timing.json"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: data/prepared.part: Not a directory; run the same")
    assert done.stderr.count("\n") == 1
