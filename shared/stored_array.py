"""One array of a shard: rows by number, straight into a caller's buffer."""

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
import zstandard

from shared.array_layout import MAX_CHUNK_BYTES, ArrayLayout

Array = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]

_MAX_INDEX = 2**28
_CHECKSUM = 4
_BLOCK, _BLOCK_HEADER = 2**17, 3
"Bytes of a zstd block's content, at most, and of what stands before it."
_SHORTEST_HEADER, _LONGEST_HEADER = 6, 18
"Of a zstd frame that says its content's size."
_SMALLEST_RAW = 4096
"Content of a chunk that is worth scattering."
_MAX_PIECES = 1024
"Linux's IOV_MAX."
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_thread = threading.local()


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
        index = read_file(path, np.empty(length, dtype=np.uint8))
        _check(index, f"{layout.file}: the index")
        table = np.frombuffer(index[:-_CHECKSUM], dtype="<u8").reshape(-1, 2)
        try:
            edges = _checked_edges(table, length, size, layout.chunk_bytes)
        except ValueError as error:
            raise ValueError(f"{layout.file}: the index {error}") from error
        return cls(path=path, layout=layout, edges=edges)

    def read_into(self, start: int, stop: int, out: Array, *, wait: bool = True) -> bool:
        """Rows `start` to `stop` into `out`, which must be contiguous and of that size and type.

        Args:
            wait: for the disk. Otherwise rows that are not in memory yet are asked for, and False
                is returned: they can be read later, and others meanwhile. `out` holds anything
                then, as after an error.

        Raises:
            ValueError: a chunk is not what was written.
            OSError: the file cannot be read.
        """
        layout = self.layout
        if not 0 <= start <= stop <= layout.shape[0]:
            raise ValueError(f"rows {start} to {stop} of an array that has {layout.shape[0]}")
        if not out.size:
            return True
        first, last = start // layout.chunk_rows, (stop - 1) // layout.chunk_rows
        low = (start - first * layout.chunk_rows) * layout.row_bytes
        wanted = out.reshape(-1).view(np.uint8)
        edges = self.edges[first : last + 2].tolist()
        flags = 0 if wait else os.RWF_NOWAIT
        descriptor = os.open(self.path, _OPEN_FLAGS)
        try:
            if not self._read_raw(descriptor, flags, first, edges, low, wanted):
                self._read_compressed(descriptor, flags, first, edges, low, wanted)
        except BlockingIOError:
            size = edges[-1] - edges[0]
            os.posix_fadvise(descriptor, edges[0], size, os.POSIX_FADV_WILLNEED)
            return False
        finally:
            os.close(descriptor)
        return True

    def _read_raw(
        self, descriptor: int, flags: int, first: int, edges: list[int], low: int, wanted: Bytes
    ) -> bool:
        """Content straight from the file to where it is wanted, if zstd stored it as it is.

        Codes of 8 and 6 bits have nothing to squeeze, so their frames are made of raw blocks (RFC
        8878, 3.1.1.2.2): content between a few bytes of framing. A chunk's size in the index tells
        whether that is so; its framing, read along, must confirm it.
        """
        size = self.layout.chunk_bytes
        if size < _SMALLEST_RAW:  # a stranger's chunks of a byte would take 700 each to read
            return False
        around = _BLOCK_HEADER * -(-size // _BLOCK) + _CHECKSUM
        headers = [end - begin - size - around for begin, end in pairwise(edges)]
        if min(headers) < _SHORTEST_HEADER or max(headers) > _LONGEST_HEADER:
            return False
        framing = _scratch("framing", edges[-1] - edges[0] - size * len(headers))
        chunks = _scattered(size, headers, low, wanted, framing)
        _read(descriptor, flags, edges[0], [piece for pieces in chunks for piece in pieces])
        for number, pieces in enumerate(chunks, first):
            found = 0
            for piece in pieces[:-1]:
                found = google_crc32c.extend(found, piece)
            _compare(found, pieces[-1], f"chunk {number}")
        place = 0
        for header in headers:
            end = place + header + around
            if not _is_raw(framing[place : end - _CHECKSUM].tobytes(), header, size):
                return False
            place = end
        return True

    def _read_compressed(
        self, descriptor: int, flags: int, first: int, edges: list[int], low: int, wanted: Bytes
    ) -> None:
        size, high = self.layout.chunk_bytes, low + len(wanted)
        stored = _scratch("stored", edges[-1] - edges[0])
        _read(descriptor, flags, edges[0], [stored])
        for number, (begin, end) in enumerate(pairwise(edges)):
            piece = stored[begin - edges[0] : end - edges[0]]
            _check(piece, f"chunk {first + number}")
            before = number * size
            start, stop = max(low, before), min(high, before + size)
            content = _inflated(piece[:-_CHECKSUM], size, f"chunk {first + number}")
            wanted[start - low : stop - low] = content[start - before : stop - before]


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
    if not (sizes > _CHECKSUM).all():
        raise ValueError("names an empty chunk")
    most = chunk_bytes + chunk_bytes // 128 + 512  # as much memory is taken to read it
    if (largest := sizes.max()) > most:
        raise ValueError(f"names a chunk of {largest} bytes, at most {most} for {chunk_bytes}")
    return edges


def _scattered(
    size: int, headers: Sequence[int], low: int, wanted: Bytes, framing: Bytes
) -> list[list[Bytes]]:
    """Where the bytes of each chunk go, in the file's order: framing, content, checksum.

    Args:
        size: bytes of a chunk's content.
        low: of the content of all chunks, the first byte that is wanted.
    """
    high = low + len(wanted)
    spare = _scratch("spare", 2 * size)  # what lies before the wanted bytes, and behind them
    chunks, place = [], 0
    for number, header in enumerate(headers):
        pieces = []
        begin, end = number * size, (number + 1) * size
        gap = header + _BLOCK_HEADER
        for block in range(begin, end, _BLOCK):
            behind = min(block + _BLOCK, end)
            pieces.append(framing[place : place + gap])
            place, gap = place + gap, _BLOCK_HEADER
            if low <= block and behind <= high:
                pieces.append(wanted[block - low : behind - low])
                continue
            if block < low:
                pieces.append(spare[block - begin : min(behind, low) - begin])
            if max(block, low) < min(behind, high):
                pieces.append(wanted[max(block, low) - low : min(behind, high) - low])
            if high < behind:
                pieces.append(spare[size + max(block, high) - begin : size + behind - begin])
        pieces.append(framing[place : place + _CHECKSUM])
        place += _CHECKSUM
        chunks.append(pieces)
    return chunks


@lru_cache
def _is_raw(framing: bytes, header: int, size: int) -> bool:
    """Whether this is the framing of `size` bytes: a frame's header, then those of raw blocks."""
    blocks = b"".join(
        (min(_BLOCK, size - begin) << 3 | (begin + _BLOCK >= size)).to_bytes(
            _BLOCK_HEADER, "little"
        )
        for begin in range(0, size, _BLOCK)
    )
    try:
        says = zstandard.frame_header_size(framing), zstandard.frame_content_size(framing)
    except zstandard.ZstdError:
        return False
    plain = not framing[4] & 0b1111  # no dictionary, no checksum of its own
    return plain and says == (header, size) and framing[header:] == blocks


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
        _read(descriptor, 0, 0, [into])
    finally:
        os.close(descriptor)
    return into


def _read(descriptor: int, flags: int, begin: int, into: list[Bytes]) -> None:
    """Bytes from `begin` on, into several pieces one after another."""
    expected = begin
    for some in (into[n : n + _MAX_PIECES] for n in range(0, len(into), _MAX_PIECES)):
        expected += sum(map(len, some))
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
    found = google_crc32c.value(stored[:-_CHECKSUM])
    _compare(found, stored[-_CHECKSUM:], what)


def _compare(found: int, stored: Bytes, what: str) -> None:
    if found != int.from_bytes(stored.tobytes(), "little"):
        raise ValueError(f"checksum of {what} does not match")
