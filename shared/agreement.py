"""How the arrays of a batch have to agree: ids, labels, rows, and what the record says.

Each array is what was written, checksums say so; but a cache may come from a stranger, and rows
that belong to other positions than the ids say would teach without an error.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from jaxtyping import Int32

from shared.prompt import IGNORE, IMAGE_TOKEN

_Counts = npt.NDArray[np.int64]


def disagreement(
    input_ids: Sequence[Int32[np.ndarray, " _"]],
    labels: Sequence[Int32[np.ndarray, " _"]],
    *,
    lengths: Sequence[int],
    images: Sequence[int],
    query_rows: Sequence[int] | None,
    response_rows: Sequence[int] | None,
    vocabulary: int,
    num_vision: int,
) -> tuple[int, str] | None:
    """The first sample of a batch that is not what `cache_specs/format.md` (Arrays) says, and how.

    Args:
        input_ids, labels: of each sample, equally many.
        lengths: tokens of each sample, as its record says.
        images: row of each sample's image, as its record says; below 0 for text only.
        query_rows: of each sample, 0 for text only; None if they are not read.
        response_rows: of each sample; None if they are not read.
        vocabulary: ids and labels lie below it.
        num_vision: vision tokens of an image.

    Returns:
        Number of the sample, what was found and what was expected; or None.
    """
    facts = _facts(
        input_ids, labels, lengths, images, query_rows, response_rows, vocabulary, num_vision
    )
    for what, found, expected in facts:
        unequal = np.flatnonzero(found != expected)
        if len(unequal):
            number = int(unequal[0])
            return number, f"{found[number]} {what}, expected {expected[number]}"
    return None


def _facts(
    input_ids: Sequence[Int32[np.ndarray, " _"]],
    labels: Sequence[Int32[np.ndarray, " _"]],
    lengths: Sequence[int],
    images: Sequence[int],
    query_rows: Sequence[int] | None,
    response_rows: Sequence[int] | None,
    vocabulary: int,
    num_vision: int,
) -> Iterator[tuple[str, _Counts, _Counts]]:
    """What is counted, its number in each sample, the number expected; each holds for the next."""
    sizes = np.array([len(ids) for ids in input_ids])
    yield "empty sequences", (sizes == 0).astype(np.int64), np.zeros_like(sizes)
    begins = np.cumsum(sizes) - sizes

    def count(mask: npt.NDArray[np.bool_]) -> _Counts:
        counts: _Counts = np.add.reduceat(mask, begins, dtype=np.int64)
        return counts

    ids, learned = np.concatenate(input_ids), np.concatenate(labels)
    is_image, is_learned = ids == IMAGE_TOKEN, learned != IGNORE
    with_image = np.array(images) >= 0
    yield "images among its ids", count(is_image), with_image.astype(np.int64)
    # As unsigned numbers negative ones are large.
    is_odd = (ids.view(np.uint32) >= vocabulary) & ~is_image
    yield "ids outside the vocabulary", count(is_odd), np.zeros_like(sizes)
    is_odd = (learned.view(np.uint32) >= vocabulary) & is_learned
    yield "labels outside the vocabulary", count(is_odd), np.zeros_like(sizes)
    yield "tokens with its image", sizes + (num_vision - 1) * with_image, np.array(lengths)
    if response_rows is not None:
        is_learned[begins] = False  # no position stands before it
        yield "response rows", np.array(response_rows), count(is_learned)
    if query_rows is not None:
        behind = np.zeros_like(sizes)
        behind[with_image] = (begins + sizes)[with_image] - np.flatnonzero(is_image) - 1
        yield "query rows", np.array(query_rows), behind
