"""Batches read into memory that held other ones before."""

from itertools import combinations

import numpy as np

from shared.batch_reads import BatchBuffers
from shared.cache import Cache


def soiled(cache: Cache) -> BatchBuffers:
    """Buffers that a large batch has left, with anything in them."""
    buffers = BatchBuffers()
    cache.read_batch(cache.keys(), buffers=buffers)
    for memory in buffers._memory.values():
        memory[:] = 0xFF
    return buffers


def with_image(cache: Cache) -> list[str]:
    return [key for key, image in zip(cache.keys(), cache.with_image, strict=True) if image]


def test_rows_behind_a_samples_own_are_zero_whatever_the_buffer_held(full_cache: Cache) -> None:
    keys = with_image(full_cache)
    rows = {key: full_cache.read(key).attention[0].shape[1] for key in keys}
    by_difference = {abs(rows[a] - rows[b]): (a, b) for a, b in combinations(keys, 2)}
    buffers = soiled(full_cache)
    assert {0, 1, 2} <= by_difference.keys()

    for pair in by_difference.values():
        found = full_cache.read_batch(pair, buffers=buffers).attention[0][""]
        for key, padded in zip(pair, found, strict=True):
            assert not padded[rows[key] :].any()
            np.testing.assert_array_equal(
                padded[: rows[key]], full_cache.read(key).attention[0].swapaxes(0, 1)
            )


def test_an_image_that_two_samples_of_a_batch_share_reaches_both(full_cache: Cache) -> None:
    key, other = with_image(full_cache)[:2]

    found = full_cache.read_batch([key, other, key], buffers=soiled(full_cache))

    for place, one in enumerate((key, other, key)):
        expected = full_cache.read(one).vision_tokens
        np.testing.assert_array_equal(found.vision_tokens[""][place], expected)
