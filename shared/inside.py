"""Opening what lies in a cache's folder, and nothing else.

A cache may come from a stranger. Each part of a path is opened from the folder before it and never
through a symbolic link, so nothing outside the cache is reached, also not by someone who swaps a
folder for a link meanwhile. Only the cache's own folder, which its user names, may be a link.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from shared.errors import DamagedError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without waiting: opening a named pipe would otherwise last for ever.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What stands in a folder, asked without following links."""

    name: str
    "Without folder."
    kind: Literal["file", "folder", "link", "special file"]
    "What it is."
    size: int
    "Bytes."
    changed: float
    "When its content last changed, seconds since 1970."


def open_inside(root: Path, path: str, folder: int | None = None) -> int:
    """A descriptor, for reading, of the regular file `root/path`; the caller closes it.

    Args:
        folder: a descriptor of the file's folder, if that is open already (`folder_inside`).

    Raises:
        DamagedError: a part of `path` is a link, or the file is a pipe, device or folder.
        OSError: it is not there or cannot be read.
    """
    if folder is None:
        with folder_inside(root, str(PurePosixPath(path).parent)) as opened:
            return open_inside(root, path, opened)
    try:
        descriptor = os.open(path.rpartition("/")[2], _FILE, dir_fd=folder)
    except OSError as error:
        raise _explained(error, root, PurePosixPath(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedError(f"{root / path}: is a folder, pipe or device, expected a file")
    return descriptor


def read_inside(root: Path, path: str, most: int, folder: int | None = None) -> bytes:
    """The content of a small file.

    Args:
        folder: as `open_inside`.

    Raises:
        DamagedError: as `open_inside`, or it is larger than `most` bytes.
        OSError: it is not there or cannot be read.
    """
    with os.fdopen(open_inside(root, path, folder), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise DamagedError(f"{root / path}: is {size} bytes, expected at most {most}")
        return file.read(size)


@contextmanager
def folder_inside(root: Path, path: str) -> Iterator[int]:
    """A descriptor of the folder `root/path` as long as the block runs.

    Raises:
        DamagedError: a part of `path` is a link or no folder, or leads out of the cache.
        OSError: it is not there or cannot be read.
    """
    parts = PurePosixPath(path)
    folder = os.open(root, _FOLDER)
    try:
        for part in parts.parts:
            if part in ("/", ".."):
                raise DamagedError(f"{root}: path {path!r} leaves the cache")
            inner = _open_folder(part, folder, root, parts)
            # In this order: after Ctrl-C in between, `finally` must not close one twice, which by
            # then may be another thread's.
            outer, folder = folder, inner
            os.close(outer)
        yield folder
    finally:
        os.close(folder)


def list_inside(root: Path, path: str) -> list[Entry]:
    """What stands in the folder `root/path`, by name; nothing if there is no such folder.

    Raises:
        DamagedError: a part of `path` is a link or no folder.
        OSError: it cannot be read.
    """
    try:
        with folder_inside(root, path) as folder:
            return _entries(folder)
    except FileNotFoundError:
        return []


def walk_inside(root: Path, path: str) -> Iterator[tuple[str, Entry]]:
    """(path relative to `root/path`, entry) of everything below a folder, but for the folders.

    Raises:
        DamagedError: the folder itself is a link or no folder, or folders lie 16 deep.
        OSError: it cannot be read.
    """
    try:
        with folder_inside(root, path) as folder:
            yield from _walk(root, PurePosixPath(path), folder, PurePosixPath())
    except FileNotFoundError:
        return


def _walk(
    root: Path, path: PurePosixPath, folder: int, place: PurePosixPath
) -> Iterator[tuple[str, Entry]]:
    if len(place.parts) > 16:
        raise DamagedError(f"{root / path / place}: lies too deep for a shard")
    for entry in _entries(folder):
        if entry.kind != "folder":
            yield str(place / entry.name), entry
            continue
        inner = _open_folder(entry.name, folder, root, path / place / entry.name)
        try:
            yield from _walk(root, path, inner, place / entry.name)
        finally:
            os.close(inner)


def _open_folder(name: str, folder: int, root: Path, path: PurePosixPath) -> int:
    """A descriptor of the folder `name` in an open one; `root/path` is named if that fails."""
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        raise _explained(error, root, path) from error


def _entries(folder: int) -> list[Entry]:
    with os.scandir(folder) as found:
        return sorted(map(_entry, found), key=lambda entry: entry.name)


def _entry(found: "os.DirEntry[str]") -> Entry:
    facts = found.stat(follow_symlinks=False)
    kind: Literal["file", "folder", "link", "special file"] = "special file"
    if stat.S_ISREG(facts.st_mode):
        kind = "file"
    elif stat.S_ISDIR(facts.st_mode):
        kind = "folder"
    elif stat.S_ISLNK(facts.st_mode):
        kind = "link"
    return Entry(name=found.name, kind=kind, size=facts.st_size, changed=facts.st_mtime)


def _explained(error: OSError, root: Path, path: PurePosixPath) -> Exception:
    # Of a link, opening a file says ELOOP and opening a folder ENOTDIR; of a socket ENXIO.
    if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
        return error
    for part in (*reversed(path.parents), path):
        if (root / part).is_symlink() and part != PurePosixPath():
            return DamagedError(
                f"{root / part}: is a symbolic link; a cache holds none (cp -rL makes a copy "
                "without links)"
            )
    return DamagedError(f"{root / path}: is not made of files and folders ({error.strerror})")
