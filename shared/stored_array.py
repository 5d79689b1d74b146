"""One array of a shard: rows by number, straight into a caller's buffer."""

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt
import zstandard

from shared.array_layout import MAX_CHUNK_BYTES, ArrayLayout
from shared.raw_chunks import CHECKSUM, Bytes, RawChunks

Array = npt.NDArray[np.generic]

_MAX_INDEX = 2**28
_MAX_STORED = 2**26
"Bytes of squeezed chunks that are read at once: a stranger's may be far larger than their content."
_MAX_PIECES = 1024
"Linux's IOV_MAX."
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_thread = threading.local()


class RowRead(NamedTuple):
    """Rows that are wanted of an array."""

    start: int
    "First row."
    stop: int
    "The row behind the last."
    out: Array
    "Where they go: contiguous, of that size and type."


@dataclass(kw_only=True)
class StoredArray:
    """One array: where its rows are. Made by `open`."""

    path: Path
    "The shard file."
    layout: ArrayLayout
    "Shape, type, chunks."
    edges: npt.NDArray[np.int64]
    "Chunk c lies at bytes `[edges[c], edges[c + 1])`."
    _edges: "memoryview[int]" = field(init=False, repr=False)
    "The same: one of them is had faster."
    _raw: RawChunks = field(init=False, repr=False)
    "What a chunk looks like that zstd left as it is."
    _is_raw: bytes = field(init=False, repr=False)
    "For each chunk 1 if it has that size, else 0."

    def __post_init__(self) -> None:
        self._edges = memoryview(self.edges)  # type: ignore[arg-type]  # numpy
        self._raw = RawChunks.of(self.layout.chunk_bytes)
        self._is_raw = self._raw.among(np.diff(self.edges))

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
        length = 16 * layout.num_chunks + CHECKSUM
        if not length <= min(size, _MAX_INDEX):
            raise ValueError(f"{layout.file} of {size} bytes cannot hold an index of {length}")
        index = read_file(path, np.empty(length, dtype=np.uint8))
        _check(index, f"{layout.file}: the index")
        table = np.frombuffer(index[:-CHECKSUM], dtype="<u8").reshape(-1, 2)
        try:
            edges = _checked_edges(table, length, size, layout.chunk_bytes)
        except ValueError as error:
            raise ValueError(f"{layout.file}: the index {error}") from error
        return cls(path=path, layout=layout, edges=edges)

    def read_into(self, reads: Sequence[RowRead], *, wait: bool = True) -> list[RowRead]:
        """Rows into the buffers that go with them; the file is opened once.

        Args:
            wait: for the disk. Otherwise rows that are not in memory yet are asked for, and their
                reads returned: they can be made later, and others meanwhile. A buffer holds
                anything then, as after an error.

        Raises:
            ValueError: a chunk is not what was written.
            OSError: the file cannot be read.
        """
        length = self.layout.shape[0]
        for start, stop, _ in reads:
            if not 0 <= start <= stop <= length:
                raise ValueError(f"rows {start} to {stop} of an array that has {length}")
        reads = [read for read in reads if read.start < read.stop]
        if not reads:  # an array without rows has no file
            return []
        descriptor = os.open(self.path, _OPEN_FLAGS)
        try:
            return [read for read in reads if not self._read_rows(descriptor, *read, wait)]
        finally:
            os.close(descriptor)

    def _read_rows(self, descriptor: int, start: int, stop: int, out: Array, wait: bool) -> bool:
        layout = self.layout
        first, behind = start // layout.chunk_rows, -(-stop // layout.chunk_rows)
        low = (start - first * layout.chunk_rows) * layout.row_bytes
        wanted = out.reshape(-1).view(np.uint8)
        flags = 0 if wait else os.RWF_NOWAIT
        try:
            if not self._read_raw(descriptor, flags, first, behind, low, wanted):
                self._read_compressed(descriptor, flags, first, behind, low, wanted)
        except BlockingIOError:
            if wait:
                raise
            begin, end = self._edges[first], self._edges[behind]
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)
            return False
        return True

    def _read_raw(
        self, descriptor: int, flags: int, first: int, behind: int, low: int, wanted: Bytes
    ) -> bool:
        """Whether these are chunks that zstd left as they are; their content, if so."""
        if self._is_raw.find(0, first, behind) >= 0:
            return False
        raw, number, size = self._raw, behind - first, self._edges[behind] - self._edges[first]
        beside = _scratch("beside", raw.beside(number))
        chunks = raw.scattered(number, low, wanted, beside)
        pieces = [piece for pieces in chunks for piece in pieces]
        _read(descriptor, flags, self._edges[first], pieces, size)
        checksums = raw.checksums(number, beside)
        if checksums is None:
            return False
        for chunk, (pieces, expected) in enumerate(zip(chunks, checksums, strict=True), first):
            found = raw.begun
            for piece in pieces[1:-1]:
                found = google_crc32c.extend(found, piece)
            if found != expected:
                raise _differs(f"chunk {chunk}")
        return True

    def _read_compressed(
        self, descriptor: int, flags: int, first: int, behind: int, low: int, wanted: Bytes
    ) -> None:
        size, high = self.layout.chunk_bytes, low + len(wanted)
        many = max(1, _MAX_STORED // _most_stored(size))
        for start in range(first, behind, many):
            stop = min(start + many, behind)
            offset = self._edges[start]
            stored = _scratch("stored", self._edges[stop] - offset)
            _read(descriptor, flags, offset, [stored], len(stored))
            for chunk in range(start, stop):
                piece = stored[self._edges[chunk] - offset : self._edges[chunk + 1] - offset]
                what = f"chunk {chunk}"
                _check(piece, what)
                before = (chunk - first) * size
                begin, end = max(low, before), min(high, before + size)
                content = _inflated(piece[:-CHECKSUM], size, what)
                wanted[begin - low : end - low] = content[begin - before : end - before]


def _checked_edges(
    table: npt.NDArray[np.uint64], length: int, size: int, chunk_bytes: int
) -> npt.NDArray[np.int64]:
    """Where chunks begin, and the file's end, from an index of (offset, size) pairs."""
    begins, sizes = table[:, 0], table[:, 1]
    if table.max() > size:
        raise ValueError(f"names bytes beyond the file's {size}")
    edges = np.append(begins, np.uint64(size)).astype(np.int64)
    # In order, without gaps, to the end of the file: no chunk can lie over another or outside.
    if begins[0] != length or not (np.diff(edges) == sizes.astype(np.int64)).all():
        raise ValueError("does not name one chunk after another")
    if not (sizes > CHECKSUM).all():
        raise ValueError("names an empty chunk")
    most = _most_stored(chunk_bytes)  # as much memory is taken to read it
    if (largest := sizes.max()) > most:
        raise ValueError(f"names a chunk of {largest} bytes, at most {most} for {chunk_bytes}")
    return edges


def _most_stored(size: int) -> int:
    """Bytes that a chunk of `size` bytes of content may take in the file."""
    return size + size // 128 + 512


def _inflated(frame: Bytes, size: int, what: str) -> Bytes:
    try:
        # Asked first: it is how much memory the library takes.
        if (found := zstandard.frame_content_size(frame.data)) != size:
            says = "an unknown number of" if found < 0 else found
            raise ValueError(f"{what} inflates to {says} bytes, expected {size}")
        content = _decompressor().decompress(frame.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"{what} cannot be inflated ({error})") from error
    return np.frombuffer(content, dtype=np.uint8)


def _scratch(purpose: str, size: int) -> Bytes:
    """Memory of this thread, used again: fresh pages cost more than copying into old ones."""
    found: Bytes | None = getattr(_thread, purpose, None)
    if found is None or len(found) < size:
        found = np.empty(size, dtype=np.uint8)
        setattr(_thread, purpose, found)
    return found[:size]


def _decompressor() -> zstandard.ZstdDecompressor:
    """Of this thread, used again: making one costs more than inflating a small chunk."""
    found: zstandard.ZstdDecompressor | None = getattr(_thread, "decompressor", None)
    if found is None:
        found = zstandard.ZstdDecompressor(max_window_size=MAX_CHUNK_BYTES)
        _thread.decompressor = found
    return found


def read_file(path: Path, into: Bytes) -> Bytes:
    """The first bytes of a file.

    Raises:
        ValueError: it is shorter.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, _OPEN_FLAGS)
    try:
        _read(descriptor, 0, 0, [into], len(into))
    finally:
        os.close(descriptor)
    return into


def _read(descriptor: int, flags: int, begin: int, into: Sequence[Bytes], size: int) -> None:
    """`size` bytes from `begin` on, into pieces of that size one after another."""
    expected = begin + size
    for n in range(0, len(into), _MAX_PIECES):
        some = into[n : n + _MAX_PIECES]
        try:
            begin += os.preadv(descriptor, some, begin, flags)  # type: ignore[arg-type]  # numpy
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            begin += os.preadv(descriptor, some, begin)  # type: ignore[arg-type]  # a file system that can only wait
    if begin != expected and flags:
        raise BlockingIOError  # a part of it is in memory
    if begin != expected:
        raise ValueError(f"ends after {begin} bytes, expected {expected}")


def _check(stored: Bytes, what: str) -> None:
    expected = int.from_bytes(stored[-CHECKSUM:].tobytes(), "little")
    if google_crc32c.value(stored[:-CHECKSUM]) != expected:
        raise _differs(what)


def _differs(what: str) -> ValueError:
    return ValueError(f"checksum of {what} does not match")
