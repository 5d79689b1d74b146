"""Reading the arrays of one committed shard: rows by number, straight into a caller's buffer.

The files are plain Zarr v3, but of one narrow profile (`cache_specs/format.md`), and this module
reads just that: one shard file per array whose inner chunks are whole rows, in order and without
gaps, each zstd and then crc32c. Metadata that says anything else is refused, so a cache from a
stranger gets no other codec, shape or place to read from. Against zarr-python this saves its fixed
cost of about a millisecond per chunk, and the index is read and checked once.

A chunk's checksum is compared whenever it is read, and a chunk can only inflate to the size that
the metadata promises. No file stays open between reads, so nothing is shared by processes or
threads, and nothing is in the way of a fork.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import zstd

from shared.errors import DamagedError
from shared.inside import Entry, walk_inside
from shared.record import ShardRecord

Array = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]

MAX_ARRAY_BYTES = 2**40
"Decoded size of one array; a 7B shard of 500 samples has 0.6 GB."
MAX_CHUNK_BYTES = 2**27
"Decoded size of one inner chunk; a 7B image in float32 is 2.4 MB."
MAX_SAMPLE_BYTES = 2**30
"Stored size of one sample's rows of one array; 2048 rows of a 7B layer in float32 are 38 MB."
_MAX_METADATA = 2**16
_MAX_INDEX = 2**28
_CHECKSUM = 4
_thread = threading.local()
_LONGEST_HEADER = 18
_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64", "float16", "float32")
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """What a `zarr.json` of our profile leaves open."""

    shape: tuple[int, ...]
    "Of the whole array."
    dtype: np.dtype[Any]
    "Of its values, little endian."
    chunk_rows: int
    "Rows of the first axis in one inner chunk."

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_chunks(self) -> int:
        """Inner chunks; an array without rows still has one in its index."""
        return max(1, -(-self.shape[0] // self.chunk_rows))

    @property
    def file(self) -> str:
        """The one shard file, relative to the array's folder."""
        return "/".join(["c", *"0" * len(self.shape)])

    @classmethod
    def parse(cls, text: bytes) -> "ArrayLayout":
        """From the bytes of a `zarr.json`.

        Raises:
            ValueError: it is not the metadata of an array as this project writes them.
        """
        found = json.loads(text)
        try:
            shape, dtype = found["shape"], found["data_type"]
            sharding = found["codecs"][0]["configuration"]
            chunk, level = sharding["chunk_shape"], sharding["codecs"][1]["configuration"]["level"]
            names = found["dimension_names"]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError("zarr.json is not that of a sharded array") from error
        _check_sizes(shape, chunk, dtype)
        if type(level) is not int or found != _metadata(shape, dtype, chunk, level, names):
            raise ValueError("zarr.json differs from the arrays of cache_specs/format.md")
        return cls(shape=tuple(shape), dtype=np.dtype(dtype).newbyteorder("<"), chunk_rows=chunk[0])


@dataclass(kw_only=True)
class StoredArray:
    """One array: where its rows are. Made by `open`."""

    path: Path
    "The shard file."
    layout: ArrayLayout
    "Shape, type, chunks."
    edges: npt.NDArray[np.int64]
    "Chunk c lies at bytes `[edges[c], edges[c + 1])`."

    @classmethod
    def open(cls, folder: Path, metadata: bytes, size: int) -> "StoredArray":
        """Parse the metadata, read and check the index.

        Args:
            size: bytes of the shard file, as the record says.

        Raises:
            ValueError: metadata or index are not as the format says.
            OSError: the file cannot be read.
        """
        layout = ArrayLayout.parse(metadata)
        path = folder / layout.file
        if layout.shape[0] == 0:
            return cls(path=path, layout=layout, edges=np.zeros(1, dtype=np.int64))
        length = 16 * layout.num_chunks + _CHECKSUM
        if not length <= min(size, _MAX_INDEX):
            raise ValueError(f"{layout.file} of {size} bytes cannot hold an index of {length}")
        index = _read_file(path, 0, np.empty(length, dtype=np.uint8))
        _check(index, f"{layout.file}: the index")
        table = np.frombuffer(index[:-_CHECKSUM], dtype="<u8").reshape(-1, 2)
        begins, sizes = table[:, 0], table[:, 1]
        if table.max() > size:
            raise ValueError(f"{layout.file}: the index names bytes beyond the file's {size}")
        edges = np.append(begins, np.uint64(size)).astype(np.int64)
        # In order, without gaps, to the end of the file: no chunk can lie over another or outside.
        if begins[0] != length or not (np.diff(edges) == sizes.astype(np.int64)).all():
            raise ValueError(f"{layout.file}: the index does not name one chunk after another")
        if not (sizes > _CHECKSUM).all():
            raise ValueError(f"{layout.file}: the index names an empty chunk")
        return cls(path=path, layout=layout, edges=edges)

    def read_into(self, start: int, stop: int, out: Array) -> None:
        """Rows `start` to `stop` into `out`, which must be contiguous and of that size and type.

        Raises:
            ValueError: a chunk is not what was written.
            OSError: the file cannot be read.
        """
        layout = self.layout
        if not 0 <= start <= stop <= layout.shape[0]:
            raise ValueError(f"rows {start} to {stop} of an array that has {layout.shape[0]}")
        if start == stop:
            return
        wanted = out.reshape(-1).view(np.uint8)
        first, last = start // layout.chunk_rows, (stop - 1) // layout.chunk_rows
        begin = int(self.edges[first])
        stored = _scratch("stored", int(self.edges[last + 1]) - begin)
        _read_file(self.path, begin, stored)
        for chunk in range(first, last + 1):
            piece = stored[int(self.edges[chunk]) - begin : int(self.edges[chunk + 1]) - begin]
            _check(piece, f"chunk {chunk}")
            self._inflate(chunk, piece[:-_CHECKSUM], start, stop, wanted)

    def _inflate(self, chunk: int, piece: Bytes, start: int, stop: int, wanted: Bytes) -> None:
        rows, row_bytes = self.layout.chunk_rows, self.layout.row_bytes
        low, high = max(start, chunk * rows), min(stop, (chunk + 1) * rows)
        target = wanted[(low - start) * row_bytes : (high - start) * row_bytes]
        whole = high - low == rows
        buffer = target if whole else _scratch("inflated", rows * row_bytes)
        # Asked first: a frame that is too short would leave the rest of the buffer as it was.
        if (found := _content_size(piece)) != len(buffer):
            raise ValueError(f"chunk {chunk} inflates to {found} bytes, expected {len(buffer)}")
        try:
            zstd.decompress(piece, buffer)  # never writes past the buffer
        except RuntimeError as error:
            raise ValueError(f"chunk {chunk} cannot be inflated ({error})") from error
        if not whole:
            skipped = (low - chunk * rows) * row_bytes
            target[:] = buffer[skipped : skipped + len(target)]


@dataclass(kw_only=True)
class ShardReader:
    """Arrays of one committed shard, opened when they are first read."""

    root: Path
    "The cache."
    record: ShardRecord
    "The shard; its samples are not asked for."
    _arrays: dict[str, StoredArray] = field(default_factory=dict)
    _small: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._folder = self.root / self.record.data
        there = dict(walk_inside(self.root, self.record.data))
        for file, stored in self.record.files.items():
            entry = there.get(file)
            if entry is None or entry.kind != "file" or entry.size != stored.size:
                found = _found(entry)
                raise self.damaged(f"{file} is {found}, its record says {stored.size} bytes")

    def has(self, name: str) -> bool:
        """Whether the shard holds this array."""
        return f"{name}/zarr.json" in self.record.files

    def layout(self, name: str) -> ArrayLayout:
        """Shape and type of an array.

        Raises:
            DamagedError: there is no such array, or its metadata is not what was written.
        """
        return self._array(name).layout

    def read_into(self, name: str, start: int, stop: int, out: Array) -> None:
        """Rows `start` to `stop` of an array's first axis into a contiguous buffer.

        Raises:
            DamagedError: the array is missing or its bytes are not what was written.
        """
        array = self._array(name)
        if out.dtype != array.layout.dtype or out.shape != (stop - start, *array.layout.shape[1:]):
            raise self.damaged(
                f"{name} has rows of {array.layout.dtype} {list(array.layout.shape[1:])}, expected "
                f"{out.dtype} {list(out.shape[1:])}"
            )
        try:
            array.read_into(start, stop, out)
        except (ValueError, OSError) as error:
            raise self.damaged(f"{name}/{array.layout.file}: {_reason(error)}") from error

    def check_rows(self, name: str, start: int, stop: int) -> None:
        """Whether one sample can have these rows; asked before memory is taken for them.

        Raises:
            DamagedError: the array has no such rows, or they are too large.
        """
        layout = self.layout(name)
        if not 0 <= start <= stop <= layout.shape[0]:
            raise self.damaged(f"{name} has {layout.shape[0]} rows, not rows {start} to {stop}")
        if (stop - start) * layout.row_bytes > MAX_SAMPLE_BYTES:
            raise self.damaged(f"{name}: rows {start} to {stop} exceed {MAX_SAMPLE_BYTES} bytes")

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of one sample in new memory."""
        self.check_rows(name, start, stop)
        layout = self.layout(name)
        out = np.empty((stop - start, *layout.shape[1:]), dtype=layout.dtype)
        self.read_into(name, start, stop, out)
        return out

    def whole(self, name: str) -> Array:
        """All of a small array, kept in memory."""
        if name not in self._small:
            self._small[name] = self.rows(name, 0, self.layout(name).shape[0])
        return self._small[name]

    def _array(self, name: str) -> StoredArray:
        if name not in self._arrays:
            self._arrays[name] = self._open(name)
        return self._arrays[name]

    def _open(self, name: str) -> StoredArray:
        files = self.record.files
        metadata = files.get(f"{name}/zarr.json")
        if metadata is None:
            raise self.damaged(f"no array {name}")
        sizes = [stored.size for file, stored in files.items() if file.startswith(f"{name}/c/")]
        try:
            if metadata.size > _MAX_METADATA:
                raise ValueError(f"zarr.json of {metadata.size} bytes")  # noqa: TRY301
            into = np.empty(metadata.size, dtype=np.uint8)
            text = _read_file(self._folder / name / "zarr.json", 0, into).tobytes()
            # No chunk's checksum covers this one: another shape or type would read as other values.
            found = hashlib.sha256(text).hexdigest()
            if found != metadata.sha256:
                raise ValueError(  # noqa: TRY301
                    f"zarr.json has sha256 {found[:12]}, but its record says {metadata.sha256[:12]}"
                )
            return StoredArray.open(self._folder / name, text, sum(sizes))
        except (ValueError, RecursionError, OSError) as error:
            raise self.damaged(f"{name}/{_reason(error)}") from error

    def damaged(self, what: str) -> DamagedError:
        """The error that says so of this shard, and what to do."""
        return DamagedError(
            f"{self.root}: shard {self.record.name}: {what}. Run cache-tools repair {self.root}, "
            f"then run build-cache on {self.record.tar.name} again"
        )


def _check_sizes(shape: Any, chunk: Any, dtype: Any) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"data_type is {dtype!r}, expected one of {', '.join(_DTYPES)}")
    for name, sizes, least in (("shape", shape, 0), ("chunk_shape", chunk, 1)):
        whole = isinstance(sizes, list) and all(type(size) is int for size in sizes)
        if not whole or not 1 <= len(sizes) <= 4 or min(sizes) < least:
            raise ValueError(f"{name} is {str(sizes)[:80]}, expected 1 to 4 sizes")
    if chunk[1:] != shape[1:]:
        raise ValueError(f"chunks of {chunk} in an array of {shape}: chunks must be whole rows")
    itemsize = np.dtype(dtype).itemsize
    for what, sizes, limit in (
        ("an array", shape, MAX_ARRAY_BYTES), ("a chunk", chunk, MAX_CHUNK_BYTES)
    ):  # fmt: skip
        if math.prod(sizes) * itemsize > limit:
            raise ValueError(f"{what} of {sizes} {dtype} is larger than {limit} bytes")


def _metadata(
    shape: Sequence[int], dtype: str, chunk: Sequence[int], level: int, names: object
) -> dict[str, Any]:
    """The whole `zarr.json` of an array of our profile, as zarr-python writes it."""
    rows = max(1, -(-shape[0] // chunk[0])) * chunk[0]
    plain = {"name": "bytes"}
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = [
        plain if dtype == "uint8" else little,
        {"name": "zstd", "configuration": {"level": level, "checksum": False}},
        {"name": "crc32c"},
    ]
    sharding = {
        "chunk_shape": list(chunk),
        "codecs": inner,
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "start",
    }
    return {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "dimension_names": names,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _found(entry: Entry | None) -> str:
    if entry is None:
        return "missing"
    return f"{entry.size} bytes" if entry.kind == "file" else f"a {entry.kind}"


def _scratch(purpose: str, size: int) -> Bytes:
    """Memory of this thread, used again: fresh pages cost more than copying into old ones."""
    found: Bytes | None = getattr(_thread, purpose, None)
    if found is None or len(found) < size:
        found = np.empty(size, dtype=np.uint8)
        setattr(_thread, purpose, found)
    return found[:size]


def _read_file(path: Path, begin: int, into: Bytes) -> Bytes:
    descriptor = os.open(path, _OPEN_FLAGS)
    try:
        size = os.preadv(descriptor, [into.data], begin)
    finally:
        os.close(descriptor)
    if size != len(into):
        raise ValueError(f"ends after {begin + size} bytes, expected {begin + len(into)}")
    return into


def _check(stored: Bytes, what: str) -> None:
    found = google_crc32c.value(stored[:-_CHECKSUM])
    if found != int.from_bytes(stored[-_CHECKSUM:].tobytes(), "little"):
        raise ValueError(f"checksum of {what} does not match")


def _content_size(stored: Bytes) -> int | None:
    """Decoded bytes as a zstd frame's header has them, or None (RFC 8878, 3.1.1.1)."""
    frame = stored[:_LONGEST_HEADER].tobytes()
    if len(frame) < 6 or frame[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = frame[4]
    single_segment = descriptor >> 5 & 1
    size = (single_segment, 2, 4, 8)[descriptor >> 6]
    begin = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    if not size or len(frame) < begin + size:
        return None
    return int.from_bytes(frame[begin : begin + size], "little") + (256 if size == 2 else 0)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
