"""Archives of images: fetched once, checked, unpacked without leaving their folder."""

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
MOST_GROWTH = 200  # times an archive's own size; pictures hardly shrink in an archive
CHUNK = 1 << 16  # bytes; a chunk that was cut off is fetched again
TIMEOUT = 30  # seconds without a byte
UTF8_NAMES = 0x800  # the flag of a member of a zip file


def images_at(path: Path, url: str, sha256: str) -> Path:
    """Give the folder of the images: an archive, from a URL or at `path`, is unpacked first.

    Raises DataError if that can't be done, or the archive isn't the one that `sha256` names.
    """
    if not url:
        return unpacked(path) if path.name.lower().endswith(ARCHIVES) and path.is_file() else path
    archive = fetched(url, sha256)
    if not sha256:
        raise DataError(
            f"prepare.sha256 is empty; set it to {hash_of(archive)}, so that another file at "
            "prepare.url is noticed"
        )
    return unpacked(archive)


def fetched(url: str, sha256: str = "") -> Path:
    """Fetch an archive into the cache folder unless it is there, going on where a try was cut off.

    An empty `sha256` takes it as it is. Raises DataError if it can't be fetched, or isn't the one
    that `sha256` names.
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
            # What was begun may have been another version of the file: once more from the start.
            if resumed and sha256 and hash_of(part) != sha256:
                part.unlink()
                _download(url, part)
            os.replace(part, file)
        digest = hash_of(file)
        if sha256 and digest != sha256:
            file.unlink()
            raise DataError(f"{url}: its SHA-256 is {digest}, prepare.sha256 says {sha256}")
    return file


def unpacked(archive: Path) -> Path:
    """Unpack an archive into the cache folder unless that was done; give where its content is.

    A single folder at its top is passed through. Nothing is written outside; links and devices
    are refused.

    Raises DataError naming the archive, and the member, if it is damaged or not to be trusted.
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
                    f"{archive}: is damaged, or no zip or tar archive; fetch or archive it anew"
                ) from None
            except (OSError, RuntimeError) as error:
                raise DataError(f"{archive}: can't be unpacked ({one_line(error)})") from None
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    inside = [p for p in target.iterdir() if p.name != "__MACOSX" and not p.name.startswith(".")]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else target


def sources_folder() -> Path:
    """Return the folder of fetched sets, an entry of the cache: a run that fetches holds it."""
    return cache_folder() / "sources"


def is_within(path: PurePosixPath) -> bool:
    """Tell whether a path stays within the folder that it is relative to."""
    return not path.is_absolute() and ".." not in path.parts


def _download(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    asked = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"} if have else {}
    try:
        with requests.get(url, headers=asked, stream=True, timeout=TIMEOUT) as answer:
            if have and answer.status_code == requests.codes.requested_range_not_satisfiable:
                return  # all of it is here
            answer.raise_for_status()
            goes_on = answer.status_code == requests.codes.partial_content
            total = int(answer.headers.get("Content-Length", 0))
            with part.open("ab" if goes_on else "wb") as out:
                chunks = answer.iter_content(CHUNK)
                for chunk in track(chunks, total, "fetch, bytes", width=len):
                    out.write(chunk)
    except requests.RequestException as error:
        reason = one_line(error, 120)
        raise DataError(f"{url}: can't be fetched ({reason}); run again to go on") from None


def _unpack(archive: Path, target: Path) -> None:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            for member in members:
                member.filename = _zip_name(member)
            _refuse(archive, [(info.filename, info.file_size) for info in members])
            twice = [n for n, k in Counter(i.filename for i in members).items() if k > 1]
            if twice:
                raise DataError(f"{archive}: holds {twice[0]!r} twice; archive it anew")
            for member in members:
                content.extract(member, target)  # links become plain files
        return
    with tarfile.open(archive) as content:
        _refuse(archive, _sizes(archive, content))
        content.extractall(target, filter="data")


def _zip_name(member: zipfile.ZipInfo) -> str:
    """Give a member's name as it was meant: older programs wrote backslashes, and other letters.

    Without the mark of UTF-8, bytes may be that all the same, a DOS code page, as the standard
    says, or Windows-1252. The letters of the first lie below 0xA6, but for one, of the last above.
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
            raise DataError(f"{archive}: {member.name} is a link or device; archive it anew")
        yield member.name, member.size


def _refuse(archive: Path, members: Iterable[tuple[str, int]]) -> None:
    """Refuse members that lie outside, and an archive that would grow without bounds."""
    total, most = 0, MOST_GROWTH * archive.stat().st_size
    for name, size in members:
        path = PurePosixPath(name.replace("\\", "/"))
        if ":" in "".join(path.parts[:1]) or not is_within(path):
            raise DataError(f"{archive}: {name} would be written outside its folder; not unpacked")
        total += size
        if total > most:
            raise DataError(f"{archive}: would grow beyond {most:,} bytes; not unpacked")
