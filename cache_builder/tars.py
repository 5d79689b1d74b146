"""Which tars are to be built, and whether the others are what their shards were built from."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from shared.errors import InputError
from shared.identity import compare
from shared.progress import progress
from shared.readable import reading
from shared.record import ShardRecord, TarFacts
from shared.samples import TarIndex, refuse_repeated_keys, tar_sha256

_ADVICE = (
    "Name the tar that the shard was built from. Another data set needs tars of other names "
    "(cache-tools pack --prefix), or a cache of its own."
)
_READERS = min(8, len(os.sched_getaffinity(0)))
"Tars that are read at a time: hashing takes a core, a disk or network more than one reader."


def find_pending(
    records: Mapping[str, ShardRecord],
    indexes: Sequence[TarIndex],
    out: Path,
    *,
    by_headers: bool = False,
) -> list[TarIndex]:
    """Tars without a record; those with one must be what their shard was built from.

    Args:
        by_headers: compare the tars' sizes and headers and do not read all of their bytes.

    Raises:
        MismatchError: names both values.
        InputError: a pending tar holds a sample that a shard of another tar holds already.
    """
    refuse_other_tars(records, indexes, out, _ADVICE, by_headers=by_headers)
    pending = [index for index in indexes if index.name not in records]
    stored = {key: record.tar.name for record in records.values() for key in record.keys}
    refuse_repeated_keys(pending, stored)
    return pending


def refuse_other_tars(
    records: Mapping[str, ShardRecord],
    indexes: Sequence[TarIndex],
    root: Path,
    advice: str,
    *,
    by_headers: bool = False,
) -> None:
    """Compare the tars that have a record with what their shards were built from.

    Args:
        root: the cache, and `advice` what to do, for the message.
        by_headers: compare the tars' sizes and headers and do not read all of their bytes.

    Raises:
        MismatchError: names both values.
    """
    known = [index for index in indexes if index.name in records]
    found = (
        ((index, _header_facts(index)) for index in known)
        if by_headers
        else ((index, asdict(facts)) for index, facts in each_tar_facts(known))
    )
    accept = ("sha256",) if by_headers else ()
    for index, here in found:
        there = asdict(records[index.name].tar)
        compare(f"{root}: shard {index.name}: tar", there, here, advice, accept)


def each_tar_facts(indexes: Sequence[TarIndex]) -> Iterator[tuple[TarIndex, TarFacts]]:
    """Facts of tar after tar; all their bytes are read, several tars at a time, and a bar says how
    far that is.
    """
    total = sum(index.path.stat().st_size for index in indexes)
    pool = ThreadPoolExecutor(_READERS, "tar")
    with progress("check tars", "B", total=total) as bar:
        try:
            facts = pool.map(lambda index: tar_facts(index, bar.update), indexes)
            yield from zip(indexes, facts, strict=True)
        finally:  # where one differs, the others are not read
            pool.shutdown(cancel_futures=True)


def tar_facts(index: TarIndex, advance: Callable[[int], object] = lambda _: None) -> TarFacts:
    """Name, size and digests of a tar; `advance` is told the bytes that are read."""
    return TarFacts(**_header_facts(index), sha256=tar_sha256(index.path, advance))


def _header_facts(index: TarIndex) -> dict[str, Any]:
    with reading(index.path, InputError):
        size = index.path.stat().st_size
    return {
        "name": index.path.name,
        "size": size,
        "index_sha256": index.sha256,
    }
