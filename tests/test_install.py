"""Every pinned package is there for every Python that the project says it runs on."""

import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

PURE = "antlr4-python3-runtime"  # Python alone, and published as source


@pytest.mark.long
@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14"])
def test_all_pins_have_wheels(version, tmp_path):
    """By pip's own resolver, without fetching; 3.11 is what the tests run on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (pin for pins in project["optional-dependencies"].values() for pin in pins)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {re.sub(r"\[.*\]", "", pin) for pin in (*project["dependencies"], *extras)}
    pins |= {line for line in lines if line and not line.startswith("#")}
    pins -= {pin for pin in pins if pin.startswith((PURE, project["name"]))}  # also its own extras
    assert len(pins) > 200
    words = ["--dry-run", "--no-deps", "--only-binary=:all:", "--python-version", version]
    words += ["--ignore-installed", "--target", str(tmp_path), *sorted(pins)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *words], capture_output=True, text=True, check=False)
    if "Failed to establish a new connection" in done.stderr:
        pytest.skip("no package index here")
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    assert done.returncode == 0, errors
