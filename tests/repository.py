"""A repository of its own with the project's graph in it, and the commands of Git and DVC there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
SETTINGS = [".gitignore", ".dvcignore", ".dvc/.gitignore", ".dvc/config"]


def environment(folder: Path) -> dict[str, str]:
    """Give what commands in a repository see: our own Python, and nobody else's Git or DVC."""
    bin_folder = Path(sys.executable).parent  # stages are started as `python`
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # a hook sets some
    env.pop("PIPELINE_CACHE", None)
    return {
        **env,
        **dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "tester"),
        **dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "tester@localhost"),
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "DVC_SITE_CACHE_DIR": str(folder.parent / "site"),
    }


def python_path(*folders: Path | str) -> str:
    """Give a module path that begins with folders and goes on with the one that tests run with."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))


def command(folder: Path, *words: str) -> str:
    """Run a command in a repository and give what it says; it has to succeed."""
    done = subprocess.run(
        words, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tool(folder: Path, name: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run one of the pipeline's commands in a repository, however it ends."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", name, *words],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )


def dvc(folder: Path, *words: str) -> str:
    return command(folder, sys.executable, "-m", "dvc", *words)


def git(folder: Path, *words: str) -> str:
    return command(folder, "git", *words)


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)


def new_repository(folder: Path, params: dict[str, Any]) -> None:
    """Make a repository with the project's code and graph and these params, and commit it."""
    shutil.copytree(ROOT / "pipeline", folder / "pipeline", ignore=lambda *_: {"__pycache__"})
    shutil.copytree(ROOT / ".dvc/plots", folder / ".dvc/plots")
    for name in ("dvc.yaml", "pyproject.toml", *SETTINGS):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    git(folder, "init", "--quiet")
    commit(folder, "start")


def change(folder: Path, key: str, value: Any) -> None:
    """Change a dotted key in a repository's params.yaml."""
    file = folder / "params.yaml"
    params = section = yaml.safe_load(file.read_text())
    *parents, name = key.split(".")
    for parent in parents:
        section = section[parent]
    assert section[name] != value
    section[name] = value
    file.write_text(yaml.safe_dump(params, sort_keys=False))


def hashes(folder: Path) -> dict[str, str]:
    """Read the hashes in dvc.lock of all outputs but the timings."""
    stages = yaml.safe_load((folder / "dvc.lock").read_text())["stages"].values()
    outs = [out for stage in stages for out in stage["outs"]]
    return {o["path"]: o["md5"] for o in outs if not o["path"].endswith("timing.json")}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return leaves
