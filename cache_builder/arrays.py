"""The arrays of one shard while its tar is run: encoded rows land here, batch by batch.

Batches come in order of length, a shard is in the tar's order. How many rows each sample has is
known from its prompt, so an array is made at its final size when its first rows come, and every
row goes straight to its place: nothing is joined or held twice.

Axes: the first one of every array is its unit (image, query or response).
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.generic]
Axes = tuple[str, ...]
_COPIES_UNDER_WAY = 4
"Encoded pieces that may still be on their way from the device."


@dataclass(frozen=True, kw_only=True)
class ShardArray:
    """One array as it is stored."""

    axes: Axes
    "Words of the glossary."
    values: Array
    "Rows of all owners."
    zstd_level: int
    "Of its lossless compression."


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Encoded rows on their way from the device."""

    name: str
    axes: Axes
    owners: Sequence[str]
    rows: Tensor
    copied: torch.cuda.Event | None
    zstd_level: int


@dataclass
class ShardArrays:
    """Encoded rows by array name. Their owners are samples (by key) or images (by digest)."""

    num_rows: Mapping[str, Mapping[str, int]]
    "Unit -> owner -> its rows; owners in the tar's order."
    _arrays: dict[str, ShardArray] = field(default_factory=dict)
    _coming: deque[_Piece] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._places = {unit: _places(rows) for unit, rows in self.num_rows.items()}

    def put(
        self, name: str, axes: Axes, owners: Sequence[str], rows: Tensor, *, zstd_level: int = 3
    ) -> None:
        """Rows of several owners, one owner after another, on any device."""
        host, copied = _start_copy(rows)
        self._coming.append(
            _Piece(
                name=name, axes=axes, owners=owners, rows=host, copied=copied,
                zstd_level=zstd_level,
            )
        )  # fmt: skip
        while len(self._coming) > _COPIES_UNDER_WAY:
            self._land(self._coming.popleft())

    def take(self, owners: Mapping[str, Collection[str]]) -> dict[str, ShardArray]:
        """Arrays by name, with the rows of those `owners` of their unit only."""
        while self._coming:
            self._land(self._coming.popleft())
        taken = {
            name: replace(array, values=self._rows_of(owners[array.axes[0]], array))
            for name, array in self._arrays.items()
        }
        return {name: array for name, array in taken.items() if len(array.values)}

    def _rows_of(self, owners: Collection[str], array: ShardArray) -> Array:
        places = self._places[array.axes[0]]
        kept = [rows for owner, rows in places.items() if owner in owners]
        if len(kept) == len(places):
            return array.values
        return np.concatenate([array.values[rows] for rows in kept]) if kept else array.values[:0]

    def _land(self, piece: _Piece) -> None:
        if piece.copied is not None:
            piece.copied.synchronize()
        values = piece.rows.numpy()
        unit = piece.axes[0]
        if piece.name not in self._arrays:
            shape = (sum(self.num_rows[unit].values()), *values.shape[1:])
            self._arrays[piece.name] = ShardArray(
                axes=piece.axes, values=np.empty(shape, dtype=values.dtype),
                zstd_level=piece.zstd_level,
            )  # fmt: skip
        array = self._arrays[piece.name].values
        start = 0
        for owner in piece.owners:
            stop = start + self.num_rows[unit][owner]
            array[self._places[unit][owner]] = values[start:stop]
            start = stop


def _places(num_rows: Mapping[str, int]) -> dict[str, slice]:
    stops = np.cumsum(list(num_rows.values()), dtype=np.int64).tolist()
    return {
        owner: slice(stop - rows, stop)
        for (owner, rows), stop in zip(num_rows.items(), stops, strict=True)
    }


def _start_copy(rows: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """`rows` in host memory; on CUDA they are there once the event has come."""
    if rows.device.type != "cuda":
        return rows.cpu(), None
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(rows.device))  # by default: of device 0
    return host, copied
