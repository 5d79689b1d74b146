"""Writing and reading one cache shard.

A shard is data first, record last. Data goes to a folder of its own that no reader looks at; then
one small JSON record names that folder and the digest of every file. The record is the shard: crash
before it, and the shard does not exist; after it, and it is whole. Two workers on one tar write two
folders and one of the two equal records stays. Why so: docs/commit.md.

Arrays are plain Zarr v3: one shard file per array (one write, one writer), small inner chunks,
zstd, and a crc32c on every chunk that is checked whenever it is read.
"""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec, ShardingCodecIndexLocation, ZstdCodec

from shared.encodings import decode
from shared.errors import CacheError, DamagedError
from shared.record import DATA, RECORDS, ShardRecord, StoredFile, compare

_CHUNK_BYTES = 256 * 1024
"Inner chunk before compression: a 7B sample's attention (128 rows, float16) is about 5 of them."


@dataclass(kw_only=True)
class ShardWriter:
    """The data folder of a shard that is not committed yet."""

    group: zarr.Group
    "The open Zarr group."
    record: ShardRecord | None = None
    "The record, once the shard is committed."

    def put(self, name: str, values: npt.NDArray[np.generic], axes: tuple[str, ...]) -> None:
        """Store one array; `axes` are words of the glossary."""
        _create(self.group, name, values, axes)


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
            _make_folder(root / DATA)
            group = zarr.open_group(str(root / data), mode="w-", zarr_format=3)
            writer = ShardWriter(group=group)
            yield writer
            record = ShardRecord(name=name, data=data, files=_seal(root / data), **facts)
        # From here on the record may name the folder, whatever is raised: it stays.
        writer.record = _commit(root, record)
    except OSError as error:
        raise CacheError(
            f"{root}: shard {name} cannot be written ({error.strerror or error}); only "
            "what has a record counts, run the same command again once that is mended"
        ) from error


def put_file(path: Path, content: bytes) -> None:
    """Write a small file so that it is either absent, old or whole.

    Raises:
        CacheError: it cannot be written.
    """
    try:
        _put(path, content)
    except OSError as error:
        raise CacheError(f"{path}: cannot be written ({error.strerror or error})") from error


@dataclass(kw_only=True)
class ShardReader:
    """Arrays of one committed shard, opened when they are first read."""

    root: Path
    "The cache."
    record: ShardRecord
    "The shard."
    _arrays: dict[str, Any] = field(default_factory=dict)
    _small: dict[str, npt.NDArray[np.generic]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A missing shard file would read as zeros, so existence is checked, not assumed.
        for file, stored in self.record.files.items():
            path = self.root / self.record.data / file
            size = path.stat().st_size if path.is_file() else None
            if size != stored.size:
                found = "missing" if size is None else f"{size} bytes"
                raise self._damaged(f"{file} is {found}, its record says {stored.size} bytes")

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Rows `start` to `stop` of an array's first axis.

        Raises:
            DamagedError: the array is missing or its bytes are not what was written.
        """
        try:
            if name not in self._arrays:
                self._arrays[name] = self._open(name)
            values = np.asarray(self._arrays[name][start:stop])
            # Asked after reading: a shard file that is gone by now may have been read as zeros.
            self._check_there(name)
        except (ValueError, RuntimeError, OSError) as error:
            raise self._damaged(f"{name}: {' '.join(str(error).split())}") from error
        return values

    def decoded(self, name: str, start: int, stop: int, encoding: str) -> npt.NDArray[np.float32]:
        """Rows of an encoded array as float32."""
        siblings = [
            array
            for array in (file.partition("/")[0] for file in self.record.files)
            if array == name or array.startswith(f"{name}__")
        ]
        parts = {a.removeprefix(name): self.rows(a, start, stop) for a in dict.fromkeys(siblings)}
        return decode(encoding, parts)

    def whole(self, name: str) -> npt.NDArray[np.generic]:
        """All of a small array, kept in memory."""
        if name not in self._small:
            self._small[name] = self.rows(name, 0, np.iinfo(np.int64).max)
        return self._small[name]

    def _check_there(self, name: str) -> None:
        for file in self.record.files:
            if file.startswith(f"{name}/c/"):
                (self.root / self.record.data / file).stat()

    def _open(self, name: str) -> Any:
        file = f"{name}/zarr.json"
        if file not in self.record.files:
            raise self._damaged(f"no array {name}")
        path = self.root / self.record.data / name
        # No chunk's checksum covers this one: a wrong shape or type would read as other values.
        found = hashlib.sha256((path / "zarr.json").read_bytes()).hexdigest()
        expected = self.record.files[file].sha256
        if found != expected:
            raise self._damaged(
                f"{file} has sha256 {found[:12]}, but its record says {expected[:12]}"
            )
        return zarr.open_array(str(path), mode="r", zarr_format=3)

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(
            f"{self.root}: shard {self.record.name}: {what}. To rebuild it, delete "
            f"records/{self.record.name}.json and run build-cache on {self.record.tar.name} again"
        )


def _create(
    group: zarr.Group, name: str, values: npt.NDArray[np.generic], axes: tuple[str, ...]
) -> None:
    row_bytes = max(1, values[:1].nbytes)
    rows = max(1, min(len(values), _CHUNK_BYTES // row_bytes))
    chunks = (rows, *values.shape[1:])
    whole = (max(1, -(-len(values) // rows)) * rows, *values.shape[1:])
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunks,
        # The index in front: servers without suffix ranges can be read.
        shards={"shape": whole, "index_location": ShardingCodecIndexLocation.start},
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
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
            _sync_folder(path)
    _sync_folder(folder)
    _sync_folder(folder.parent)
    return files


def _commit(root: Path, record: ShardRecord) -> ShardRecord:
    """Put the record in place, or take the one that another build put there meanwhile."""
    path = root / RECORDS / f"{record.name}.json"
    if path.exists():
        there = ShardRecord.load(path)
        for what, found, ours in (
            ("", there.identity, record.identity), (": tar", vars(there.tar), vars(record.tar)),
        ):  # fmt: skip
            advice = "Keep builds that differ in their own folders."
            compare(f"{root}: shard {record.name}{what}", found, ours, advice)
        shutil.rmtree(root / record.data, ignore_errors=True)
        return there
    _make_folder(path.parent)
    _sync_folder(root)  # a run that was killed may have made these folders and not got here
    _put(path, record.to_json().encode())
    return record


def _put(path: Path, content: bytes) -> None:
    _make_folder(path.parent)
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
    _sync_folder(path.parent)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, each known to the disk before the next."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network mounts know no such
            raise
    finally:
        os.close(descriptor)
