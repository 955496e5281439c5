"""Archives of images: fetch them once, verify them, and unpack them safely."""

import hashlib
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import requests

from pipeline.stage_runtime.cache_entries import hold
from pipeline.stage_runtime.errors import DataError, one_line
from pipeline.stage_runtime.files import hash_of
from pipeline.stage_runtime.progress import track
from pipeline.stage_runtime.settings import cache_folder

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MOST_GROWTH = 200  # limit on unpacked / archive size; images hardly shrink in an archive
CHUNK = 1 << 16  # bytes; a chunk that was cut off is fetched again
TIMEOUT = 30  # seconds without a byte
UTF8_NAMES = 0x800  # the flag of a member of a zip file


def images_at(path: Path, url: str, sha256: str) -> Path:
    """Return the folder of the images; an archive, from a URL or at `path`, is unpacked first.

    Raises DataError if that fails, or if the archive's SHA-256 is not `sha256`.
    """
    if not url:
        return unpacked(path) if path.name.lower().endswith(ARCHIVES) and path.is_file() else path
    archive = fetched(url, sha256)
    if not sha256:
        raise DataError(
            f"prepare.sha256 is empty; set it to {hash_of(archive)}, so that a change of the file "
            "at prepare.url is noticed"
        )
    return unpacked(archive)


def fetched(url: str, sha256: str = "") -> Path:
    """Fetch an archive to the cache folder unless it is there; resume an interrupted download.

    An empty `sha256` accepts any archive. Raises DataError if it can't be fetched, or if its
    SHA-256 is not `sha256`.
    """
    name = PurePosixPath(urlparse(url).path).name
    if urlparse(url).scheme not in ("http", "https") or not name.lower().endswith(ARCHIVES):
        raise DataError(f"prepare.url = {url!r}: expected http(s)://.../NAME{'|'.join(ARCHIVES)}")
    # Keyed by the address: two archives may have one name.
    file = sources_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    part = file.with_name(file.name + ".part")
    with hold(sources_folder(), "fetch"):
        if not file.is_file():
            resumed = part.exists()
            _download(url, part)
            # The first part may be of another version of the file: fetch all of it again.
            if resumed and sha256 and hash_of(part) != sha256:
                part.unlink()
                _download(url, part)
            os.replace(part, file)
        digest = hash_of(file)
        if sha256 and digest != sha256:
            file.unlink()
            raise DataError(
                f"{url}: its SHA-256 is {digest}, not {sha256}; correct prepare.sha256 or the URL"
            )
    return file


def unpacked(archive: Path) -> Path:
    """Unpack an archive to the cache folder unless that was done; return the folder of its content.

    A single folder at the top is skipped. Nothing is written outside the target; links and devices
    are refused.

    Raises DataError naming the archive, and the member, if it is damaged or unsafe.
    """
    target = sources_folder() / hash_of(archive)[:16]
    with hold(sources_folder(), "unpack"):
        if not target.is_dir():
            fresh = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
            try:
                _unpack(archive, fresh)
                os.replace(fresh, target)
            except (EOFError, zipfile.BadZipFile, tarfile.TarError):
                raise DataError(
                    f"{archive}: damaged, or not a zip or tar archive; fetch or create it again"
                ) from None
            except (OSError, RuntimeError) as error:
                raise DataError(f"{archive}: can't be unpacked ({one_line(error)})") from None
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    inside = [p for p in target.iterdir() if p.name != "__MACOSX" and not p.name.startswith(".")]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else target


def sources_folder() -> Path:
    """Return the folder of fetched data sets, a cache entry that is locked by runs that fetch."""
    return cache_folder() / "sources"


def is_within(path: PurePosixPath) -> bool:
    """Return whether a path stays within the folder that it is relative to."""
    return not path.is_absolute() and ".." not in path.parts


def _download(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    asked = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"} if have else {}
    try:
        with requests.get(url, headers=asked, stream=True, timeout=TIMEOUT) as answer:
            if have and answer.status_code == requests.codes.requested_range_not_satisfiable:
                return  # already complete
            answer.raise_for_status()
            goes_on = answer.status_code == requests.codes.partial_content
            total = int(answer.headers.get("Content-Length", 0))
            with part.open("ab" if goes_on else "wb") as out:
                chunks = answer.iter_content(CHUNK)
                for chunk in track(chunks, total, "fetch, bytes", width=len):
                    out.write(chunk)
    except requests.RequestException as error:
        reason = one_line(error, 120)
        raise DataError(f"{url}: can't be fetched ({reason}); run again to resume") from None


def _unpack(archive: Path, target: Path) -> None:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            for member in members:
                member.filename = _zip_name(member)
            _refuse(archive, [(info.filename, info.file_size) for info in members])
            twice = [n for n, k in Counter(i.filename for i in members).items() if k > 1]
            if twice:
                raise DataError(f"{archive}: contains {twice[0]!r} twice; create it again")
            for member in members:
                content.extract(member, target)  # links become plain files
        return
    with tarfile.open(archive) as content:
        _refuse(archive, _sizes(archive, content))
        content.extractall(target, filter="data")


def _zip_name(member: zipfile.ZipInfo) -> str:
    """Return a member's intended name: older programs wrote backslashes and other encodings.

    Without the UTF-8 flag, the name may still be UTF-8, or in a DOS code page, as the standard
    says, or Windows-1252. Letters of DOS code pages are below 0xA6, except one; those of
    Windows-1252 are above.
    """
    name = member.orig_filename
    if not member.flag_bits & UTF8_NAMES and not name.isascii():
        content = name.encode("cp437")  # how zipfile reads them
        try:
            name = content.decode("utf-8")
        except UnicodeDecodeError:
            of_dos = all(byte < 0xA6 or byte == 0xE1 for byte in content)
            name = content.decode("cp850" if of_dos else "cp1252", errors="replace")
    return name.replace("\\", "/")


def _sizes(archive: Path, content: tarfile.TarFile) -> Iterator[tuple[str, int]]:
    for member in content:
        if not (member.isfile() or member.isdir()):
            raise DataError(f"{archive}: {member.name} is a link or device; leave it out")
        yield member.name, member.size


def _refuse(archive: Path, members: Iterable[tuple[str, int]]) -> None:
    """Refuse members outside the folder, and archives that are too large when unpacked."""
    total, most = 0, MOST_GROWTH * archive.stat().st_size
    for name, size in members:
        path = PurePosixPath(name.replace("\\", "/"))
        if ":" in "".join(path.parts[:1]) or not is_within(path):
            raise DataError(f"{archive}: {name} would be written outside its folder; not unpacked")
        total += size
        if total > most:
            raise DataError(f"{archive}: its content exceeds {most:,} bytes; not unpacked")
