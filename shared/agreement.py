"""How the arrays of a batch have to agree: ids, labels, rows, and what the record says.

Each array is what was written, checksums say so; but a cache may come from a stranger, and rows
that belong to other positions than the ids say would teach without an error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Int32

from shared.prompt import IGNORE, IMAGE_TOKEN

_Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class StoredSequences:
    """What shards and records say of some samples."""

    input_ids: Sequence[Int32[np.ndarray, " _"]]
    "Of each sample."
    labels: Sequence[Int32[np.ndarray, " _"]]
    "Of each sample, as many as ids."
    lengths: Sequence[int]
    "Tokens of each sample, as its record says."
    images: Sequence[int]
    "Row of each sample's image, as its record says; below 0 for text only."
    query_rows: Sequence[int] | None
    "Of each sample, 0 for text only; None if they are not read."
    response_rows: Sequence[int] | None
    "Of each sample; None if they are not read."
    vocabulary: int
    "Ids and labels lie below it."
    num_vision: int
    "Vision tokens of an image."


def disagreement(stored: StoredSequences) -> tuple[int, str] | None:
    """The first sample that is not what `cache_specs/format.md` (Arrays) says, and how.

    Returns:
        Number of the sample, what was found and what was expected; or None.
    """
    for what, found, expected in _facts(stored):
        unequal = np.flatnonzero(found != expected)
        if len(unequal):
            number = int(unequal[0])
            return number, f"{found[number]} {what}, expected {expected[number]}"
    return None


def _facts(stored: StoredSequences) -> Iterator[tuple[str, _Counts, _Counts]]:
    """(what, count found in each sample, count expected); later ones rely on those before."""
    sizes = np.array([len(ids) for ids in stored.input_ids])
    yield "empty sequences", (sizes == 0).astype(np.int64), np.zeros_like(sizes)
    begins = np.cumsum(sizes) - sizes

    def count(mask: npt.NDArray[np.bool_]) -> _Counts:
        counts: _Counts = np.add.reduceat(mask, begins, dtype=np.int64)
        return counts

    ids, learned = np.concatenate(stored.input_ids), np.concatenate(stored.labels)
    is_image, is_learned = ids == IMAGE_TOKEN, learned != IGNORE
    with_image = np.array(stored.images) >= 0
    yield "images among its ids", count(is_image), with_image.astype(np.int64)
    # As unsigned numbers negative ones are large.
    is_odd = (ids.view(np.uint32) >= stored.vocabulary) & ~is_image
    yield "ids outside the vocabulary", count(is_odd), np.zeros_like(sizes)
    is_odd = (learned.view(np.uint32) >= stored.vocabulary) & is_learned
    yield "labels outside the vocabulary", count(is_odd), np.zeros_like(sizes)
    yield (
        "tokens with its image",
        sizes + (stored.num_vision - 1) * with_image,
        np.array(stored.lengths),
    )
    if stored.response_rows is not None:
        is_learned[begins] = False  # no position stands before it
        yield "response rows", np.array(stored.response_rows), count(is_learned)
    if stored.query_rows is not None:
        behind = np.zeros_like(sizes)
        behind[with_image] = (begins + sizes)[with_image] - np.flatnonzero(is_image) - 1
        yield "query rows", np.array(stored.query_rows), behind
