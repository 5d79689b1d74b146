"""Writing so that it is known to the disk: what is there after a power cut is whole.

A file's bytes and the name of it in its folder are two things to a disk, and each is pushed to it.
"""

import errno
import os
import uuid
from contextlib import suppress
from pathlib import Path

from shared.errors import ProjectError


def put_file(path: Path, content: bytes, error: type[ProjectError]) -> None:
    """Write a small file so that it is either absent, old or whole; `error` is raised if it cannot
    be written.
    """
    try:
        put(path, content)
    except OSError as reason:
        raise error(f"{path}: cannot be written ({reason.strerror or reason})") from reason


def put(path: Path, content: bytes) -> None:
    """As `put_file`.

    Raises:
        OSError: it cannot be written.
    """
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, each known to the disk before the next."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Push the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network mounts know no such
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Push all files below a folder, and their names, to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
