"""One array of a shard: rows by number, straight into a caller's buffer."""

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard
from google_crc32c import value as crc32c

from shared.array_layout import MAX_CHUNK_BYTES, ArrayLayout
from shared.raw_chunks import CHECKSUM, Bytes, RawChunks

_MAX_INDEX = 2**28
_MAX_STORED = 2**26
"Bytes of squeezed chunks that are read at once: a stranger's may be far larger than their content."
_MAX_PIECES = 1024
"Linux's IOV_MAX."
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_RESIDUE = 0x48674BC7
"crc32c of any bytes and their crc32c behind them, little endian."


class RowRead(NamedTuple):
    """Rows that are wanted of an array."""

    start: int
    "First row."
    stop: int
    "The row behind the last."
    out: Bytes
    "Where they go: as many bytes."


class _Scratch(threading.local):
    """What a thread uses again and again: making it costs more than using it for a small chunk."""

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_CHUNK_BYTES)

    def memory(self, size: int) -> Bytes:
        """Bytes of any content, until this thread asks again: fresh pages cost more than copying
        into old ones.
        """
        if len(self._memory) < size:
            self._memory = np.empty(size, dtype=np.uint8)
        return self._memory[:size]


_scratch = _Scratch()


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
    "The same: indexing a memoryview is faster than indexing an array."
    _raw: RawChunks = field(init=False, repr=False)
    "What a chunk looks like that zstd left as it is."
    _is_raw: bytes = field(init=False, repr=False)
    "For each chunk 1 if it has that size, else 0."
    _at_once: int = field(init=False, repr=False)
    "Squeezed chunks that are read at once."

    def __post_init__(self) -> None:
        self._at_once = max(1, _MAX_STORED // _most_stored(self.layout.chunk_bytes))
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
        if crc32c(index) != _RESIDUE:
            raise _differs(f"{layout.file}: the index")
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
        length, row_bytes = self.layout.shape[0], self.layout.row_bytes
        for start, stop, out in reads:
            if not 0 <= start <= stop <= length:
                raise ValueError(f"rows {start} to {stop} of an array that has {length}")
            if len(out) != (stop - start) * row_bytes:
                raise ValueError(f"{len(out)} bytes for rows {start} to {stop} of {row_bytes} each")
        reads = [read for read in reads if read.start < read.stop]
        if not reads:  # an array without rows has no file
            return []
        descriptor = os.open(self.path, _OPEN_FLAGS)
        try:
            flags = 0 if wait else os.RWF_NOWAIT
            return [read for read in reads if not self._read_rows(descriptor, flags, *read)]
        finally:
            os.close(descriptor)

    def _read_rows(self, descriptor: int, flags: int, start: int, stop: int, out: Bytes) -> bool:
        each = self.layout.chunk_rows
        first, behind = start // each, -(-stop // each)
        low = (start - first * each) * self.layout.row_bytes
        try:
            is_raw = self._is_raw.find(0, first, behind) < 0
            # What is not raw blocks after all, or damaged, is read as any other: that names damage.
            if not (is_raw and self._read_raw(descriptor, flags, first, behind, low, out)):
                self._read_compressed(descriptor, flags, first, behind, low, out)
        except BlockingIOError:
            if not flags:  # it was to wait
                raise
            begin, end = self._edges[first], self._edges[behind]
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)
            return False
        return True

    def _read_raw(
        self, descriptor: int, flags: int, first: int, behind: int, low: int, wanted: Bytes
    ) -> bool:
        """Read chunks of the size that raw blocks have; whether they are that and undamaged.

        If not, `wanted` holds anything.
        """
        number, begin = behind - first, self._edges[first]
        beside = _scratch.memory(self._raw.beside(number))
        pieces, covered = self._raw.scattered(number, low, wanted, beside)
        _read(descriptor, flags, begin, pieces, self._edges[behind] - begin)
        return self._raw.are_whole(covered, beside)

    def _read_compressed(
        self, descriptor: int, flags: int, first: int, behind: int, low: int, wanted: Bytes
    ) -> None:
        size, edges, high = self.layout.chunk_bytes, self._edges, len(wanted)
        # Slices of a memoryview cost half of what slices of an array do.
        into = memoryview(wanted)  # type: ignore[arg-type]  # numpy
        at = -low  # where a chunk's content begins, seen from the wanted bytes
        for start in range(first, behind, self._at_once):
            stop = min(start + self._at_once, behind)
            offset = edges[start]
            stored = _scratch.memory(edges[stop] - offset)
            _read(descriptor, flags, offset, [stored], len(stored))
            for chunk in range(start, stop):
                piece = stored[edges[chunk] - offset : edges[chunk + 1] - offset]
                content = memoryview(_inflated(piece, size, chunk))
                begin, end = max(at, 0), min(at + size, high)
                into[begin:end] = content[begin - at : end - at]
                at += size


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


def _inflated(stored: Bytes, size: int, chunk: int) -> bytes:
    """The content of a chunk, once its checksum and its size are compared."""
    if crc32c(stored) != _RESIDUE:
        raise _differs(f"chunk {chunk}")
    frame = stored[:-CHECKSUM]
    try:
        # Asked first: it is how much memory the library takes.
        if (found := zstandard.frame_content_size(frame)) != size:  # type: ignore[arg-type]  # numpy
            says = "an unknown number of" if found < 0 else found
            raise ValueError(f"chunk {chunk} inflates to {says} bytes, expected {size}")
        return _scratch.decompressor.decompress(frame, allow_extra_data=False)  # type: ignore[arg-type]  # numpy
    except zstandard.ZstdError as error:
        raise ValueError(f"chunk {chunk} cannot be inflated ({error})") from error


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


def _differs(what: str) -> ValueError:
    return ValueError(f"checksum of {what} does not match")
