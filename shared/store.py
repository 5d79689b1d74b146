"""Writing one cache shard.

A shard is data first, record last. Data goes to a folder of its own that no reader looks at; then
one small JSON record names that folder and the digest of every file. The record is the shard: crash
before it, and the shard does not exist; after it, and it is whole. Two workers on one tar write two
folders and one of the two equal records stays. Why so: docs/commit.md.

Arrays are plain Zarr v3: one shard file per array (one write, one writer), small inner chunks,
zstd, and a crc32c on every chunk that is checked whenever it is read.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from msgspec.structs import asdict
from zarr.codecs import Crc32cCodec, ZstdCodec

from shared.durable import make_folder, put, sync_folder
from shared.errors import CacheError
from shared.identity import compare
from shared.record import DATA, RECORDS, ShardRecord, StoredFile

_CHUNK_BYTES, _SMALL_CHUNK_BYTES = 64 * 1024, 16 * 1024
"""Inner chunks before compression. Large ones hold a signal's codes: a 7B sample's attention (128
rows of 6 bits) is 8 of them, and its vision tokens are one chunk of their own size. Small ones hold
what has a few bytes a row or stands beside a signal, of which a sample wants some kilobytes."""
_LARGE_ROW = 1024


@dataclass(kw_only=True)
class ShardWriter:
    """The data folder of a shard that is not committed yet."""

    group: zarr.Group
    "The open Zarr group."
    record: ShardRecord | None = None
    "The record, once the shard is committed."

    def put(
        self,
        name: str,
        values: npt.NDArray[np.generic],
        axes: tuple[str, ...],
        *,
        zstd_level: int = 3,
    ) -> None:
        """Store one array; `axes` are words of the glossary."""
        put_array(self.group, name, values, axes, zstd_level=zstd_level)

    def put_offsets(self, name: str, lengths: Sequence[int]) -> None:
        """Store where parts of these lengths begin that lie one behind the other, and the end."""
        offsets = np.cumulative_sum(lengths, dtype=np.int64, include_initial=True)
        self.put(name, offsets, ("boundary",))


@contextmanager
def new_shard(root: Path, name: str, **facts: Any) -> Iterator[ShardWriter]:
    """A writer; the shard is committed if the block ends without an exception, else dropped.

    Args:
        facts: the fields of ShardRecord besides `name`, `data` and `files`.

    Raises:
        CacheError: the cache cannot be written (read-only, full, no permission).
        MismatchError: another build committed this shard meanwhile, from something else.
    """
    data = f"{DATA}/{name}-{uuid.uuid4().hex[:8]}"
    try:
        with _dropped_on_failure(root / data):
            make_folder(root / DATA)
            group = zarr.open_group(str(root / data), mode="w-", zarr_format=3)
            writer = ShardWriter(group=group)
            yield writer
            record = ShardRecord(name=name, data=data, files=_seal(root / data), **facts)
            content = record.to_json()
        # From here on the record may name the folder, whatever is raised: it stays.
        writer.record = _commit(root, record, content)
    except OSError as error:
        raise CacheError(
            f"{root}: shard {name} cannot be written ({error.strerror or error}); only "
            "what has a record counts, run the same command again once that is mended"
        ) from error


def put_array(
    group: zarr.Group,
    name: str,
    values: npt.NDArray[np.generic],
    axes: tuple[str, ...],
    *,
    zstd_level: int = 3,
) -> None:
    """One array of a shard, in the profile that `shared.reader` reads."""
    row_bytes = max(1, values[:1].nbytes)
    is_large = row_bytes >= _LARGE_ROW and "__" not in name
    chunk_bytes = _CHUNK_BYTES if is_large else _SMALL_CHUNK_BYTES
    rows = max(1, min(len(values), chunk_bytes // row_bytes))
    chunks = (rows, *values.shape[1:])
    whole = (max(1, -(-len(values) // rows)) * rows, *values.shape[1:])
    # The index in front: servers without suffix ranges can be read. Any: the types of zarr 3.1 ask
    # for a member of an enum, which later ones deprecate.
    shards: Any = {"shape": whole, "index_location": "start"}
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunks,
        shards=shards,
        compressors=[ZstdCodec(level=zstd_level), Crc32cCodec()],
        dimension_names=axes,
        fill_value=0,
        config={"write_empty_chunks": True},  # an absent chunk and a lost one look the same
    )
    if len(values):
        array[...] = values


@contextmanager
def _dropped_on_failure(folder: Path) -> Iterator[None]:
    """Give the space of a shard that comes to nothing back: it may be what the disk lacks."""
    try:
        yield
    except BaseException:  # Ctrl-C too
        shutil.rmtree(folder, ignore_errors=True)  # what stays is never read; gc sweeps it
        raise


def _seal(folder: Path) -> dict[str, StoredFile]:
    """Digest every file and push it, and the folders that name it, to the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            name = path.relative_to(folder).as_posix()
            files[name] = StoredFile(size=path.stat().st_size, sha256=digest)
        else:
            sync_folder(path)
    sync_folder(folder)
    sync_folder(folder.parent)
    return files


def _commit(root: Path, record: ShardRecord, content: bytes) -> ShardRecord:
    """Put the record in place, or take the one that another build put there meanwhile."""
    path = root / RECORDS / f"{record.name}.json"
    if path.exists():
        there = ShardRecord.load(root, record.name)
        for what, found, ours in (
            ("", there.identity, record.identity), (": tar", asdict(there.tar), asdict(record.tar)),
        ):  # fmt: skip
            advice = "Keep builds that differ in their own folders."
            compare(f"{root}: shard {record.name}{what}", found, ours, advice)
        shutil.rmtree(root / record.data, ignore_errors=True)
        return there
    make_folder(path.parent)
    sync_folder(root)  # a run that was killed may have made these folders and not got here
    put(path, content)
    return record
