"""Where each sample of a cache is: derived from the records, never stored.

Held in arrays instead of a Python object per sample, so that a million samples take about 40 MB and
are indexed in well under a second.
"""

from collections.abc import Iterable, Iterator
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Int32

from shared.errors import MismatchError
from shared.record import ShardRecord

_BETWEEN_KEYS = "\0"
"In no key: a tar cannot name such a member."


@dataclass(kw_only=True)
class SampleIndex:
    """Shard and row of every key, and what the records say of each sample."""

    shards: tuple[str, ...]
    "Shard names."
    _keys: tuple[str, ...]
    "Of each shard, all keys in one text."
    _first: npt.NDArray[np.int64]
    "Number of each shard's first sample; the last entry is the number of samples."
    lengths: Int32[np.ndarray, " samples"]
    "Tokens of each sample, vision tokens counted, in the order of `keys`."
    images: Int32[np.ndarray, " samples"]
    "Row of each sample on its shard's `image` axis; -1 for text only."
    hashes: InitVar[npt.NDArray[np.int64]]
    "Of the keys, in their order, by this process."
    _starts: dict[int, npt.NDArray[np.int32]] = field(default_factory=dict, init=False, repr=False)
    "Where each key begins in its shard's text; of the shards that were asked for."
    _hashes: npt.NDArray[np.int64] = field(init=False, repr=False)
    "Sorted hashes of the keys."
    _numbers: npt.NDArray[np.int64] = field(init=False, repr=False)
    "Sample number of each entry of `_hashes`."

    def __post_init__(self, hashes: npt.NDArray[np.int64]) -> None:
        self._sort(hashes)
        self._refuse_twins()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        # Python's hash of a text differs from process to process.
        return {k: v for k, v in vars(self).items() if k not in ("_hashes", "_numbers", "_starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._starts = {}
        self._sort(_hashes_of(self.keys(), len(self)))

    def keys(self) -> Iterator[str]:
        """All keys, shard by shard."""
        for number in range(len(self.shards)):
            yield from self._keys_of(number)

    def find(self, key: str) -> tuple[int, int, int] | None:
        """(number of the sample, number of its shard, row in it), or None."""
        wanted = hash(key)
        place = int(self._hashes.searchsorted(wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            number = int(self._numbers[place])
            shard, row = self._place(number)
            if self._is_key(shard, row, key):
                return number, shard, row
            place += 1
        return None

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(self._first.searchsorted(number, side="right")) - 1
        return shard, number - int(self._first[shard])

    def _is_key(self, shard: int, row: int, key: str) -> bool:
        if shard not in self._starts:
            sizes = [len(one) + len(_BETWEEN_KEYS) for one in self._keys_of(shard)]
            self._starts[shard] = np.cumsum([0, *sizes], dtype=np.int32)
        begin, behind = self._starts[shard][row : row + 2].tolist()
        return self._keys[shard][begin : behind - len(_BETWEEN_KEYS)] == key

    def _keys_of(self, shard: int) -> list[str]:
        return self._keys[shard].split(_BETWEEN_KEYS) if self._keys[shard] else []

    def _sort(self, hashes: npt.NDArray[np.int64]) -> None:
        self._numbers = np.argsort(hashes)
        self._hashes = hashes[self._numbers]

    def _refuse_twins(self) -> None:
        equal = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        pairs = (sorted(self._numbers[place : place + 2].tolist()) for place in equal)
        for pair in sorted(pairs):  # in the cache's order: the order of hashes is never the same
            one, other = map(self._place, pair)
            key = self._keys_of(one[0])[one[1]]
            if key == self._keys_of(other[0])[other[1]]:
                raise MismatchError(
                    f"sample {key!r} stands in shard {self.shards[one[0]]} and in "
                    f"{self.shards[other[0]]}; keys must differ: pack the data again with "
                    "cache-tools pack"
                )


@dataclass(kw_only=True)
class IndexCollector:
    """Takes records one by one, so that their samples need not all be in memory."""

    _shards: list[str] = field(default_factory=list)
    _keys: list[str] = field(default_factory=list)
    _lengths: list[npt.NDArray[np.int32]] = field(default_factory=list)
    _images: list[npt.NDArray[np.int32]] = field(default_factory=list)
    _hashes: list[npt.NDArray[np.int64]] = field(default_factory=list)

    def add(self, record: ShardRecord) -> None:
        """Note a shard's samples."""
        self._shards.append(record.name)
        self._keys.append(_BETWEEN_KEYS.join(record.keys))
        self._lengths.append(np.fromiter(record.lengths, np.int32, len(record.lengths)))
        self._images.append(np.fromiter(record.images, np.int32, len(record.images)))
        self._hashes.append(_hashes_of(record.keys, len(record.keys)))

    def index(self) -> SampleIndex:
        """The index of all records that were added.

        Raises:
            MismatchError: one key stands in two shards.
        """
        none = [np.zeros(0, dtype=np.int32)]
        counts = [len(lengths) for lengths in self._lengths]
        return SampleIndex(
            shards=tuple(self._shards),
            _keys=tuple(self._keys),
            _first=np.cumulative_sum(counts, dtype=np.int64, include_initial=True),
            lengths=np.concatenate(none + self._lengths),
            images=np.concatenate(none + self._images),
            hashes=np.concatenate([np.zeros(0, dtype=np.int64), *self._hashes]),
        )


def _hashes_of(keys: Iterable[str], count: int) -> npt.NDArray[np.int64]:
    return np.fromiter(map(hash, keys), dtype=np.int64, count=count)
