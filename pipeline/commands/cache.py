"""Verify every object in DVC's cache, and remove the damaged ones.

    python -m pipeline cache

DVC trusts its cache: if the disk returns other bytes than were written, it checks these out without
notice. `dvc pull` fetches removed objects from a remote, or `dvc repro` recomputes them with the
same bytes.
"""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.stage_runtime.errors import PipelineError
from pipeline.stage_runtime.progress import say, track


class NoCacheError(PipelineError):
    """The folder holds no DVC project."""


def objects(cache: Path) -> list[Path]:
    """List the objects of a cache folder; each is named by the MD5 of its content."""
    return [f for f in sorted(cache.glob("[0-9a-f][0-9a-f]/*")) if len(f.name.split(".")[0]) == 30]


def damaged(files: list[Path]) -> Iterator[Path]:
    """Yield the objects whose content doesn't match their name."""
    for file in track(files, len(files), "objects"):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False))
        if digest.hexdigest() != file.parent.name + file.name.split(".")[0]:
            yield file


def cache_of(root: Path) -> Path:
    """Return the cache folder of the project at `root`. Raises NoCacheError if there is none."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            return Path(repo.cache.local.path)
    except DvcException as error:
        raise NoCacheError(f"{root}: {' '.join(str(error).split())}") from None


def main() -> None:
    """Check all objects and delete damaged ones; exit with 1 if there are any."""
    parser_of("cache", __doc__ or "").parse_args()
    with one_line_errors():
        found = objects(cache_of(Path()))
        spoilt = list(damaged(found))
        for file in spoilt:
            file.chmod(0o644)
            file.unlink()
            say(f"damaged, and removed: {file.parent.name}{file.name}")
        if spoilt:
            sys.exit(f"error: {len(spoilt)} damaged; `dvc pull` or `dvc repro` restores them")
