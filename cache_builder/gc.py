"""Leftovers of builds that were killed: data folders that no record names, half-written files.

They are never read, so they only take space. What looks like one may belong to a build that runs
just now, here or on another machine: its data comes before its record. So only what nothing has
been written to for a while is swept.
"""

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.errors import CacheError
from shared.inside import Entry, list_inside, walk_inside
from shared.plan import PLANS
from shared.readable import reading
from shared.record import DATA, RECORDS, no_cache, read_records

_DATA_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*-[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """Something that no reader looks at."""

    path: str
    "Relative to the cache."
    size: int
    "Bytes."
    age: float
    "Seconds since something in it changed."


def sweep(root: Path, *, older_than: float, dry_run: bool) -> tuple[list[Leftover], list[Leftover]]:
    """Delete leftovers; those deleted (or that would be), and those that are too young.

    Links are neither followed nor deleted, nor is anything whose name no build gives.

    Args:
        older_than: seconds in which nothing in a leftover has changed.

    Raises:
        DamagedError: a record is damaged: which folder it names is not known.
        CacheError: no cache here, or something cannot be deleted.
    """
    found = find_leftovers(root)
    old = [leftover for leftover in found if leftover.age >= older_than]
    young = [leftover for leftover in found if leftover.age < older_than]
    if not dry_run:
        for leftover in old:
            remove(root, leftover.path)
    return old, young


def find_leftovers(root: Path) -> list[Leftover]:
    """All leftovers, whatever their age; raises as `sweep`."""
    with reading(root, CacheError):
        # Folders first: one whose record comes in between is in use, not left over.
        candidates = list(_candidates(root))
        if not list_inside(root, RECORDS) and not candidates:
            raise no_cache(root, "records or data")
        named = {record.data for record in read_records(root).values()}
        now = time.time()
        return [_measure(root, path, entry, now) for path, entry in candidates if path not in named]


def remove(root: Path, path: str) -> None:
    """Delete a file or folder of a cache; a link is deleted, never what it points to.

    Raises:
        CacheError: it cannot be deleted.
    """
    target = root / path
    try:
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)  # follows no link inside
        else:
            target.unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(f"{target}: cannot be deleted ({error.strerror})") from error


def _candidates(root: Path) -> Iterator[tuple[str, Entry]]:
    for entry in list_inside(root, DATA):
        if entry.kind == "folder" and _DATA_FOLDER.fullmatch(entry.name):
            yield f"{DATA}/{entry.name}", entry
    for folder in (RECORDS, PLANS, DATA):
        for entry in list_inside(root, folder):
            if entry.kind == "file" and entry.name.endswith(".partial"):
                yield f"{folder}/{entry.name}", entry


def _measure(root: Path, path: str, entry: Entry, now: float) -> Leftover:
    size, changed = 0, entry.changed
    if entry.kind == "file":
        size = entry.size
    else:
        for _, inner in walk_inside(root, path):
            size, changed = size + inner.size, max(changed, inner.changed)
    return Leftover(path=path, size=size, age=max(0.0, now - changed))
