"""Results travel: to a bucket and back, past a cut-off push, a damaged and a shared cache."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
import torch
from conftest import FORMATS, STAGES
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer
from repository import change, command, commit, dvc, environment, git, hashes, tool
from test_graph import stages_run, stale

from pipeline.nets import checkpoint

BUCKET = "results"
KEYS = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of S3's protocol on loopback, with a bucket; gives its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    requests.post(f"{address}/moto-api/reset", timeout=10)  # of the server before, in this process
    boto3.client("s3", endpoint_url=address, region_name="us-east-1", **KEYS).create_bucket(
        Bucket=BUCKET
    )
    yield address
    server.stop()


def use(folder: Path, address: str) -> None:
    """Make the bucket a repository's remote, as its owner would."""
    words = {"endpointurl": address, "region": "us-east-1"}
    words |= {"access_key_id": "key", "secret_access_key": "secret"}
    dvc(folder, "remote", "add", "--local", "--default", "store", f"s3://{BUCKET}/store")
    for key, value in words.items():
        dvc(folder, "remote", "modify", "--local", "store", key, value)


def kept(address: str) -> int:
    """Count the objects in the bucket."""
    client: Any = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **KEYS)
    return int(client.list_objects_v2(Bucket=BUCKET)["KeyCount"])


def clone_of(repo: Path, folder: Path) -> Path:
    git(repo.parent, "clone", "--quiet", str(repo), str(folder))
    return folder


@pytest.mark.long
def test_a_clone_pulls_from_a_bucket_what_was_pushed_there(repo, s3, tmp_path):
    use(repo, s3)
    dvc(repo, "push")
    clone = clone_of(repo, tmp_path / "elsewhere" / "clone")
    use(clone, s3)
    dvc(clone, "pull", "--run-cache")
    assert set() == stale(clone)
    assert [] == stages_run(dvc(clone, "repro"))


@pytest.mark.long
def test_an_interrupted_push_is_finished_by_the_next(repo, s3, tmp_path, monkeypatch):
    use(repo, s3)
    put = S3Response.put_object

    def slowly(self: S3Response) -> Any:
        time.sleep(0.1)
        return put(self)

    monkeypatch.setattr(S3Response, "put_object", slowly)
    words = [sys.executable, "-m", "dvc", "push", "--jobs", "1"]
    process = subprocess.Popen(words, cwd=repo, env=environment(repo), stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < give_up:
        if kept(s3):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    some = kept(s3)
    dvc(repo, "push")
    assert 0 < some < kept(s3)
    clone = clone_of(repo, tmp_path / "elsewhere" / "clone")
    use(clone, s3)
    dvc(clone, "pull")
    assert set() == stale(clone)


def check_cache(folder: Path) -> "subprocess.CompletedProcess[str]":
    return tool(folder, "cache")


@pytest.mark.long
def test_a_damaged_object_is_found_and_made_again(repo):
    assert check_cache(repo).returncode == 0
    expected = hashes(repo)
    digest = expected["models/stage2/model.safetensors"]
    file = repo / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    content = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = check_cache(repo)
    assert done.returncode == 1
    assert f"damaged, and removed: {digest}" in done.stdout
    assert done.stderr == "error: 1 damaged; `dvc pull` or `dvc repro` restores them\n"
    dvc(repo, "repro")
    assert expected == hashes(repo)
    assert content == file.read_bytes()
    assert check_cache(repo).returncode == 0


def test_a_damaged_object_comes_back_from_a_remote(repo, tmp_path):
    dvc(repo, "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    dvc(repo, "push")
    digest = hashes(repo)["models/stage1/model.safetensors"]
    file = repo / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    content = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(b"other bytes")
    (repo / "models/stage1/model.safetensors").unlink()
    assert check_cache(repo).returncode == 1
    dvc(repo, "pull")
    assert content == (repo / "models/stage1/model.safetensors").read_bytes()
    assert set() == stale(repo)


@pytest.mark.long
def test_two_clones_share_one_cache(repo, tmp_path):
    shared = tmp_path / "shared"
    dvc(repo, "cache", "dir", "--local", str(shared))
    shutil.copytree(repo / ".dvc/cache", shared)
    clone = clone_of(repo, tmp_path / "elsewhere" / "clone")
    dvc(clone, "cache", "dir", "--local", str(shared))
    (clone / "dvc.lock").unlink()
    said = dvc(clone, "repro")
    assert [] == stages_run(said)
    assert len(STAGES) == said.count("is cached - skipping run")
    assert hashes(repo) == hashes(clone)


@pytest.mark.long
def test_two_clones_run_at_once_into_one_cache(repo, tmp_path):
    clones = []
    for name in ("one", "two"):
        clone = clone_of(repo, tmp_path / name / "clone")
        dvc(clone, "cache", "dir", "--local", str(tmp_path / "shared"))
        clones.append(clone)
    words = [sys.executable, "-m", "dvc", "repro", "--force"]
    running = [
        subprocess.Popen(
            words,
            cwd=clone,
            env={
                **environment(clone),
                "PIPELINE_CACHE": str(tmp_path / "trunks"),
                "PIPELINE_THREADS": "1",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.DEVNULL,
        )
        for clone in clones
    ]
    assert [process.wait() for process in running] == [0, 0]
    assert hashes(clones[0]) == hashes(clones[1])
    assert command(clones[0], "git", "status", "--short") != ""
    assert os.listdir(tmp_path / "shared")


@pytest.mark.long
@pytest.mark.parametrize(
    ("precision", "lowered"),
    [
        ("bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
        ("fp32", {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default"}),
    ],
)
def test_a_run_of_another_processor_goes_on_here(precision, lowered, repo, tmp_path, monkeypatch):
    """Pulled and changed at stage 2 alone, though its arithmetic rounds otherwise."""
    if precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no bfloat16 to be without")
    change(repo, "precision", precision)
    change(repo, "prepare.test_fraction", 0.2)  # so that stage 1 isn't in the cache
    with monkeypatch.context() as patch:
        for name, value in lowered.items():
            patch.setenv(name, value)
        dvc(repo, "repro")
    commit(repo, "elsewhere")
    dvc(repo, "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    dvc(repo, "push")
    clone = clone_of(repo, tmp_path / "here" / "clone")
    dvc(clone, "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    dvc(clone, "pull")
    change(clone, "stage2.lr", 1e-4)
    assert stages_run(dvc(clone, "repro")) == ["stage2", "evaluate", "report"]
    _, meta = checkpoint.read(clone / "models/stage1/model.safetensors")
    with (clone / "models/stage2/history.csv").open() as lines:
        first = next(csv.DictReader(lines))
    assert float(first["val_loss"]) != meta["val"]["loss"]  # or nothing was proven
    assert float(first["val_loss"]) == pytest.approx(meta["val"]["loss"], abs=0.02)


@pytest.mark.long
@pytest.mark.parametrize("precision", FORMATS)
def test_the_remedy_for_a_checkpoint_that_is_not_of_these_images_works(precision, repo):
    """`dvc repro -f stage1`, as the line says."""
    change(repo, "precision", precision)
    dvc(repo, "repro", "stage1")
    file = repo / "models/stage1/model.safetensors"
    tensors, meta = checkpoint.read(file)
    file.chmod(0o644)
    checkpoint.write(file, tensors, {**meta, "val_images": "0" * 64})
    dvc(repo, "commit", "--force", "stage1")
    refused = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"],
        **{"cwd": repo, "env": environment(repo), "capture_output": True, "text": True},
        check=False,
    )
    assert refused.returncode != 0
    assert "run `dvc repro -f stage1`" in refused.stderr
    dvc(repo, "repro", "-f", "stage1")
    dvc(repo, "repro")
