"""Where each sample is, also where hashes and texts make it hard to tell."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from shared.errors import MismatchError
from shared.index import IndexCollector, SampleIndex
from shared.record import ShardRecord
from tests.support import record


def shard(found: ShardRecord, name: str, *keys: str) -> ShardRecord:
    """A record of a shard of these samples, the n-th of n + 1 tokens."""
    lengths, images = tuple(range(1, len(keys) + 1)), (-1,) * len(keys)
    return msgspec.structs.replace(
        found, name=name, data=f"data/{name}-01234567", probe=(), keys=keys, lengths=lengths,
        images=images, tar=msgspec.structs.replace(found.tar, name=f"{name}.tar"),
    )  # fmt: skip


@pytest.fixture
def any_record(cache_path: Path) -> ShardRecord:
    """To be changed."""
    return record(cache_path, "ref-000000")


def index(*records: ShardRecord) -> SampleIndex:
    collector = IndexCollector()
    for one in records:
        collector.add(one)
    return collector.index()


def test_keys_are_found_whatever_letters_and_empty_shards_stand_before_them(
    any_record: ShardRecord,
) -> None:
    keys = ("\u5b57\U0001f600", "é/é", "a", "aa", "a.b")
    found = index(
        shard(any_record, "s"), shard(any_record, "t", "b"), shard(any_record, "u"),
        shard(any_record, "v", *keys),
    )  # fmt: skip

    assert list(found.keys()) == ["b", *keys]
    assert found.find("b") == (0, 1, 0)
    assert [found.find(key) for key in keys] == [(1 + row, 3, row) for row in range(5)]
    assert found.find("é") is None
    assert found.find("") is None


def test_keys_whose_hashes_are_equal_are_told_apart() -> None:
    found = SampleIndex(
        shards=("s",), _keys=("a\0b\0c",), _first=np.array([0, 3]),
        lengths=np.ones(3, dtype=np.int32), images=np.zeros(3, dtype=np.int32),
        hashes=np.full(3, hash("c")),
    )  # fmt: skip

    assert found.find("c") == (2, 0, 2)


def test_of_keys_that_stand_twice_the_first_is_named_with_its_shards_in_order(
    any_record: ShardRecord,
) -> None:
    keys = [f"k{n}" for n in range(20)]

    with pytest.raises(MismatchError, match="sample 'k0' stands in shard s and in t; keys must"):
        index(shard(any_record, "s", *keys), shard(any_record, "t", *reversed(keys)))
