"""What a batch wants of the shards, all of it asked for before any of it is waited for.

Rows that lie in the page cache are read at once. Of the others the kernel is told first, so that
the disk fetches them side by side while the batch waits for one after another. A file system that
cannot say whether it would wait (tmpfs) just waits.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.reader import ShardReader
from shared.stored_array import RowRead

Array = npt.NDArray[Any]


class BatchBuffers:
    """Memory that batches are read into again and again: its pages are fresh only once.

    A batch that was read into buffers holds until the next one is read into them.
    """

    def __init__(self) -> None:
        self._memory: dict[str, npt.NDArray[np.uint8]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array with any content in the memory of this name."""
        size = math.prod(shape) * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or len(memory) < size:
            self._memory[name] = memory = np.empty(size, dtype=np.uint8)
        return memory[:size].view(dtype).reshape(shape)


class Rows(NamedTuple):
    """One sample's rows on an axis of its shard."""

    reader: ShardReader
    "The shard."
    start: int
    "First row."
    stop: int
    "The row behind the last."

    @property
    def number(self) -> int:
        """Of rows."""
        return self.stop - self.start


class BatchReads:
    """Takes memory for a batch and notes what is to be read into it; `run` reads.

    Its methods raise DamagedError for rows that a shard does not have, before memory is taken.
    """

    def __init__(self, buffers: BatchBuffers) -> None:
        self._buffers = buffers
        self._reads: dict[tuple[str, int], tuple[ShardReader, list[RowRead]]] = {}
        self._copies: list[tuple[Array, Array]] = []

    def one_by_one(self, name: str, samples: Sequence[Rows]) -> list[Array]:
        """Each sample's rows in new memory of their own."""
        return [self._noted(name, rows, self._new(name, rows)) for rows in samples]

    def padded(self, name: str, samples: Sequence[Rows]) -> Array:
        """Rows of each sample in one array, zeros behind the shorter ones."""
        longest = max(rows.number for rows in samples)
        padded = self._take(name, samples, (len(samples), longest))
        for rows, out in zip(samples, padded, strict=True):
            self._noted(name, rows, out[: rows.number])
            out[rows.number :] = 0
        return padded

    def single(self, name: str, samples: Sequence[Rows]) -> Array:
        """The one row of each sample; a row that two samples share is read once."""
        single = self._take(name, samples, (len(samples),))
        seen: dict[tuple[int, int], int] = {}
        for number, rows in enumerate(samples):
            twin = seen.setdefault((id(rows.reader), rows.start), number)
            if twin == number:
                self._noted(name, rows, single[number : number + 1])
            else:
                self._copies.append((single[number], single[twin]))
        return single

    def joined(self, name: str, samples: Sequence[Rows]) -> Array:
        """Rows of all samples one after another."""
        joined = self._take(name, samples, (sum(rows.number for rows in samples),))
        end = 0
        for rows in samples:
            begin, end = end, end + rows.number
            self._noted(name, rows, joined[begin:end])
        return joined

    def run(self) -> None:
        """Read all of it.

        Raises:
            DamagedError: an array is missing or its bytes are not what was written.
        """
        late = [
            (reader, name, reader.read_into(name, reads, wait=False))
            for (name, _), (reader, reads) in self._reads.items()
        ]
        for reader, name, reads in late:
            if reads:
                reader.read_into(name, reads)
        for out, source in self._copies:
            out[...] = source

    def _noted(self, name: str, rows: Rows, out: Array) -> Array:
        _, reads = self._reads.setdefault((name, id(rows.reader)), (rows.reader, []))
        reads.append(RowRead(rows.start, rows.stop, out))
        return out

    def _new(self, name: str, rows: Rows) -> Array:
        rows.reader.check_rows(name, rows.start, rows.stop)
        layout = rows.reader.layout(name)
        return np.empty((rows.number, *layout.shape[1:]), dtype=layout.dtype)

    def _take(self, name: str, samples: Sequence[Rows], shape: tuple[int, ...]) -> Array:
        for rows in samples:
            rows.reader.check_rows(name, rows.start, rows.stop)
        layout = samples[0].reader.layout(name)
        return self._buffers.take(name, (*shape, *layout.shape[1:]), layout.dtype)
