"""Looking at files: our own error that names one that may not be read, not a traceback.

`Path.is_file` raises for a file in a folder that may not be searched (from Python 3.14 on it says
no), and libraries give reasons of their own for a file that may not be read.
"""

import hashlib
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path

from shared.errors import ProjectError

NO_URLS = (
    "is a URL: only file systems are read and written. Download it (rclone, rsync, wget) or mount "
    "it, and name the folder"
)


def sha256_of(file: RawIOBase, advance: Callable[[int], object]) -> str:
    """Digest of the rest of an unbuffered file, hexadecimal.

    Args:
        advance: told the bytes that are done, piece by piece, for a progress bar.

    Raises:
        OSError: it cannot be read.
    """
    digest, buffer = hashlib.sha256(), bytearray(2**20)
    view = memoryview(buffer)
    while size := file.readinto(buffer):
        digest.update(view[:size])
        advance(size)
    return digest.hexdigest()


def is_url(text: str) -> bool:
    """Whether it begins with `scheme://`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def is_file(path: Path, error: type[ProjectError]) -> bool:
    """Whether there is a file; `error` is raised where that cannot be told."""
    return stat.S_ISREG(_mode(path, error))


def is_folder(path: Path, error: type[ProjectError]) -> bool:
    """Whether there is a folder; `error` is raised where that cannot be told."""
    return stat.S_ISDIR(_mode(path, error))


@contextmanager
def reading(path: Path, error: type[ProjectError]) -> Iterator[None]:
    """Of a block that reads `path`: an OSError becomes `error`, which names file and reason."""
    try:
        yield
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror or reason})") from reason


def check_readable(path: Path, error: type[ProjectError]) -> None:
    """Raise `error` unless the file opens and its first byte can be read."""
    with reading(path, error), path.open("rb") as file:
        file.read(1)


def _mode(path: Path, error: type[ProjectError]) -> int:
    """Type and mode; 0 if there is nothing."""
    with reading(path, error):
        try:
            return path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no name of a file
            return 0
