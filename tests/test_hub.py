"""Weights by a network's name, from a hub on loopback: fetched once, checked, or refused."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hub_server import COMMIT, Hub
from safetensors.torch import save

from pipeline.nets.backbone import build

WEIGHTS = "model.safetensors"
# In a process of its own: the hub's library reads the environment when it is imported.
LOAD = """
import json, sys
from hashlib import sha256
from pipeline.nets.backbone import pretrained
from pipeline.stage_runtime.errors import PipelineError
from safetensors.torch import save
found = []
for name, weights, digest in json.loads(sys.argv[1]):
    said = []
    try:
        model, backbone = pretrained(name, weights, digest, 0, said.append)
        content = save(model.state_dict())
        found.append([sha256(content).hexdigest(), backbone.facts(), said])
    except PipelineError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def drawn(name: str, seed: int = 0) -> bytes:
    """Draw a network's weights, as safetensors."""
    torch.manual_seed(seed)
    return save(build(f"timm/{name}", 1000).state_dict())


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    repositories = {
        "test_vit.r160_in1k": drawn("test_vit"),
        "test_convnext.r160_in1k": drawn("test_convnext"),
        "test_vit3.r160_in1k": 403,
        "test_efficientnet.r160_in1k": 429,
        "test_resnet.r160_in1k": drawn("test_convnext"),
    }
    with Hub({(f"timm/{name}", WEIGHTS): found for name, found in repositories.items()}) as server:
        yield server


def loaded(
    hub_address: str, home: Path, *asked: tuple[str, str, str], largest: int = -1, **env: str
) -> list:
    """Load networks in a process that can write files of at most `largest` bytes."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(asked)],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub_address, "HF_HOME": str(home), **env},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_name_is_enough_and_the_hub_is_asked_once(hub, tmp_path):
    hub.asked.clear()
    content = hub.files["timm/test_vit.r160_in1k", WEIGHTS]
    [[found, facts, said]] = loaded(hub.address, tmp_path, ("timm/test_vit", "imagenet", ""))
    assert found == digest(content)
    assert facts["sha256"] == digest(content)
    assert facts["repository"] == "timm/test_vit.r160_in1k"
    assert facts["commit"] == COMMIT
    assert said[-1].endswith(
        f"set backbone.sha256 to {digest(content)}, so that a changed file is detected"
    )
    assert hub.asked

    hub.asked.clear()
    again = ("timm/test_vit.r160_in1k", "pretrained", digest(content))
    for offline in ("0", "1"):
        [[found, _, said]] = loaded(hub.address, tmp_path, again, HF_HUB_OFFLINE=offline)
        assert found == digest(content)
        assert said == []
    assert hub.asked == []


def test_a_file_that_changed_upstream_is_refused(hub, tmp_path):
    [said] = loaded(hub.address, tmp_path, ("timm/test_vit", "imagenet", "0" * 64))
    assert said.endswith(f"backbone.sha256 says {'0' * 64}")


@pytest.mark.long
def test_a_download_that_was_cut_off_goes_on(hub, tmp_path):
    hub.cut_off.add("timm/test_convnext.r160_in1k")
    content = hub.files["timm/test_convnext.r160_in1k", WEIGHTS]
    [[found, *_]] = loaded(hub.address, tmp_path, ("timm/test_convnext", "imagenet", ""))
    assert found == digest(content)


@pytest.mark.long
def test_what_a_hub_can_answer_is_a_line(hub, tmp_path):
    lines = {
        "timm/test_vit2": "test_vit2.r160_in1k: no such repository, or a private one; set HF_TOKEN",
        "timm/test_vit3": "test_vit3.r160_in1k: its licence has to be accepted there first; then "
        "set HF_TOKEN",
        "timm/test_efficientnet": "429",
        "timm/test_resnet": "not weights of this network",
        "timm/test_vit.r160": "no such weights; did you mean timm/test_vit.r160_in1k?",
        "timm/test_vitt": "no such network; did you mean timm/test_vit ",
        "timm/test_vit4.": "no such weights",
    }
    found = loaded(hub.address, tmp_path, *((name, "imagenet", "") for name in lines))
    for said, line in zip(found, lines.values(), strict=True):
        assert line in said
        assert "\n" not in said


@pytest.mark.long
def test_without_a_hub_or_a_cache_it_is_said_what_to_do(hub, tmp_path):
    asked = ("timm/test_vit", "imagenet", "")
    (tmp_path / "file").write_text("")
    for home, env in ((tmp_path, {"HF_HUB_OFFLINE": "1"}), (tmp_path / "file", {})):
        [said] = loaded(hub.address, home, asked, **env)
        assert "model.safetensors can't be fetched (" in said
        assert said.endswith("or get the file elsewhere and set backbone.weights to it")


@pytest.mark.long
def test_a_cache_that_is_read_only_or_full_is_a_line_and_nothing_is_half_written(hub, tmp_path):
    asked = ("timm/test_vit", "imagenet", "")
    places = ((Path("/proc/hub"), -1, "No such file"), (tmp_path, 100_000, "File too large"))
    for home, largest, reason in places:  # not even root can write to /proc
        [said] = loaded(hub.address, home, asked, largest=largest)
        assert "model.safetensors can't be fetched ([Errno" in said
        assert reason in said
        assert said.endswith("or get the file elsewhere and set backbone.weights to it")
    assert not list(tmp_path.rglob("blobs/*"))
    [[found, *_]] = loaded(hub.address, tmp_path, asked)  # once there is room
    assert found == digest(hub.files["timm/test_vit.r160_in1k", WEIGHTS])
