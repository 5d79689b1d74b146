"""What a batch wants of the shards, all of it asked for before any of it is waited for.

Rows that lie in the page cache are read at once. Of the others the kernel is told first, so that
the disk fetches them side by side while the batch waits for one after another. A file system that
cannot say whether it would wait (tmpfs) just waits.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, pairwise
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

    Readers have to know what the arrays are expected to be: the first one's layout is taken for
    that of all. Methods raise DamagedError for rows that a shard does not have, before memory is
    taken.
    """

    def __init__(self, buffers: BatchBuffers) -> None:
        self._buffers = buffers
        self._reads: dict[tuple[str, ShardReader], list[RowRead]] = defaultdict(list)
        self._copies: list[tuple[Array, Array]] = []

    def one_by_one(self, name: str, samples: Sequence[Rows]) -> list[Array]:
        """Each sample's rows, one behind the other in new memory."""
        if not samples:
            return []
        edges = _edges(samples)
        joined = self._rows(name, samples, edges[:-1], edges[-1], BatchBuffers())
        return [joined[begin:end] for begin, end in pairwise(edges)]

    def padded(self, name: str, samples: Sequence[Rows]) -> Array:
        """Rows of each sample in one array, zeros behind the shorter ones."""
        number, longest = len(samples), max(rows.number for rows in samples)
        begins = [place * longest for place in range(number)]
        padded = self._rows(name, samples, begins, number * longest, self._buffers)
        for begin, rows in zip(begins, samples, strict=True):
            if rows.number < longest:
                padded[begin + rows.number : begin + longest] = 0
        return padded.reshape(number, longest, *padded.shape[1:])

    def single(self, name: str, samples: Sequence[Rows]) -> Array:
        """The one row of each sample; a row that two samples share is read once."""
        first: dict[Rows, int] = {}
        twins = [first.setdefault(rows, place) for place, rows in enumerate(samples)]
        single = self._rows(name, [*first], [*first.values()], len(samples), self._buffers)
        self._copies += [
            (single[place], single[twin]) for place, twin in enumerate(twins) if place != twin
        ]
        return single

    def joined(self, name: str, samples: Sequence[Rows]) -> Array:
        """Rows of all samples one after another."""
        edges = _edges(samples)
        return self._rows(name, samples, edges[:-1], edges[-1], self._buffers)

    def run(self) -> None:
        """Read all of it.

        Raises:
            DamagedError: an array is missing or its bytes are not what was written.
        """
        late = [
            (reader, name, reader.read_into(name, reads, wait=False))
            for (name, reader), reads in self._reads.items()
        ]
        for reader, name, reads in late:
            if reads:
                reader.read_into(name, reads)
        for out, source in self._copies:
            out[...] = source

    def _rows(
        self,
        name: str,
        samples: Sequence[Rows],
        begins: Sequence[int],
        number: int,
        buffers: BatchBuffers,
    ) -> Array:
        """Memory for `number` rows; those of each sample are read to where they begin in it."""
        layout = samples[0].reader.layout(name)
        for reader, start, stop in samples:
            reader.check_rows(name, start, stop)
        memory = buffers.take(name, (number, *layout.shape[1:]), layout.dtype)
        flat, size = memory.reshape(-1).view(np.uint8), layout.row_bytes
        for begin, (reader, start, stop) in zip(begins, samples, strict=True):
            out = flat[begin * size : (begin + stop - start) * size]
            self._reads[name, reader].append(RowRead(start, stop, out))
        return memory


def _edges(samples: Sequence[Rows]) -> list[int]:
    """Where the rows of each sample begin, laid one behind the other, and where the last end."""
    return [*accumulate((rows.number for rows in samples), initial=0)]
