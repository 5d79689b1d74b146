"""Where the samples of a run lie in their tars, in arrays instead of an object for each.

A worker process that touches an object copies the memory page that it is in: its reference count
is written. Objects of 2.4 million samples would come to about a gigabyte in every worker.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from shared.samples import Member, SampleEntry


class Entries(Sequence[tuple[Path, SampleEntry]]):
    """(tar, where in it) of each sample."""

    def __init__(self, entries: Iterable[tuple[Path, SampleEntry]]) -> None:
        """In this order."""
        tars: dict[Path, int] = {}
        keys, rows = [], []
        for tar, entry in entries:
            image = entry.image or Member(offset=-1, size=0)
            keys.append(entry.key.encode())
            rows.append(
                (
                    tars.setdefault(tar, len(tars)),
                    *(entry.annotation.offset, entry.annotation.size, image.offset, image.size),
                )
            )
        self._tars = tuple(tars)
        self._rows = np.array(rows, dtype=np.int64).reshape(-1, 5)
        self._keys = b"".join(keys)
        self._edges = np.cumulative_sum(
            [len(key) for key in keys], dtype=np.int64, include_initial=True
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[Path, SampleEntry]:  # type: ignore[override]  # no slices
        tar, offset, size, image_offset, image_size = self._rows[number].tolist()
        begin, end = self._edges[number : number + 2].tolist()
        return self._tars[tar], SampleEntry(
            key=self._keys[begin:end].decode(),
            annotation=Member(offset=offset, size=size),
            image=None if image_offset < 0 else Member(offset=image_offset, size=image_size),
        )
