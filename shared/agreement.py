"""How the arrays of a batch have to agree: ids, labels, rows, and what the record says.

Each array is what was written, checksums say so; but a cache may come from a stranger, and rows
that belong to other positions than the ids say would teach without an error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from jaxtyping import Int32

from shared.prompt import IGNORE, IMAGE_TOKEN


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
        for number, (count, wanted) in enumerate(zip(found, expected, strict=True)):
            if count != wanted:
                return number, f"{count} {what}, expected {wanted}"
    return None


def _facts(stored: StoredSequences) -> Iterator[tuple[str, Sequence[int], Sequence[int]]]:
    """(what, count found in each sample, count expected); later ones rely on those before.

    Counts are lists: for the few samples of a batch Python is faster than numpy.
    """
    sizes = [len(ids) for ids in stored.input_ids]
    zeros = [0] * len(sizes)
    yield "empty sequences", [int(size == 0) for size in sizes], zeros
    begins = [*accumulate(sizes[:-1], initial=0)]

    def count(mask: npt.NDArray[np.bool_]) -> list[int]:
        counts: list[int] = np.add.reduceat(mask, begins, dtype=np.int64).tolist()
        return counts

    ids, learned = np.concatenate(stored.input_ids), np.concatenate(stored.labels)
    is_image, is_learned = ids == IMAGE_TOKEN, learned != IGNORE
    with_image = [int(image >= 0) for image in stored.images]
    yield "images among its ids", count(is_image), with_image
    # As unsigned numbers negative ones are large.
    is_odd = (ids.view(np.uint32) >= stored.vocabulary) & ~is_image
    yield "ids outside the vocabulary", count(is_odd), zeros
    is_odd = (learned.view(np.uint32) >= stored.vocabulary) & is_learned
    yield "labels outside the vocabulary", count(is_odd), zeros
    lengths = [
        size + (stored.num_vision - 1) * image
        for size, image in zip(sizes, with_image, strict=True)
    ]
    yield "tokens with its image", lengths, stored.lengths
    if stored.response_rows is not None:
        is_learned[begins] = False  # no position stands before it
        yield "response rows", stored.response_rows, count(is_learned)
    if stored.query_rows is not None:
        places = iter(np.flatnonzero(is_image).tolist())
        behind = [
            begin + size - next(places) - 1 if image else 0
            for begin, size, image in zip(begins, sizes, with_image, strict=True)
        ]
        yield "query rows", stored.query_rows, behind
