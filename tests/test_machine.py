"""The command that says what a machine has: true, and it notices what computes wrongly."""

import os

import psutil
import pytest
import torch
import yaml
from conftest import FORMATS, ROOT
from repository import tool

from pipeline.commands import machine
from pipeline.nets.fuse import fuse


def test_it_says_what_is_used_and_why(repo):
    done = tool(repo, "machine")
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    here = f"{len(psutil.Process().cpu_affinity() or [])} of {os.cpu_count()} processors"
    assert here in lines["threads"]
    assert ("GPU" if torch.cuda.is_available() else "processor") in lines["number format"]
    assert lines["images"].split()[1] == "32"
    assert "0.00 GB as raw" in lines["images"]
    assert "fp32: outputs and gradients differ by" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.endswith(" images/s")]) == 3


@pytest.mark.long
def test_it_says_what_the_environment_asks_for(repo, monkeypatch):
    for name, said in {"DEVICE": "cpu", "THREADS": "1", "PROCESSES": "2", "CACHE_GB": "3"}.items():
        monkeypatch.setenv(f"PIPELINE_{name}", said)
    said = tool(repo, "machine").stdout
    assert "set by PIPELINE_DEVICE" in said
    words = {line.split()[0]: line.split()[1] for line in said.splitlines()}
    assert (words["threads"], words["processes"], words["cache"]) == ("1", "2", "3")


@pytest.mark.parametrize("form", FORMATS)
def test_a_network_that_computes_wrongly_is_noticed(form, monkeypatch, capsys):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["backbone"]["name"] = "timm/test_efficientnet"
    assert machine.told_right(params, form)

    def wrong(model: torch.nn.Module, precision: str) -> torch.nn.Module:
        folded = fuse(model, precision)
        folded.classifier.register_forward_hook(lambda module, given, output: 2 * output)
        return folded

    monkeypatch.setattr(machine, "fuse", wrong)
    assert not machine.told_right(params, form)
    assert "more than" in capsys.readouterr().out
