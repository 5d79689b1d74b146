"""Ids, labels, rows and record of one sample that do not fit one another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_builder.cli import cache_tools
from shared.agreement import StoredSequences, disagreement
from shared.cache import Cache, open_cache
from shared.errors import DamagedError
from tests.malicious import DISAGREEMENTS, forge
from tests.support import invoke, record

Facts = dict[str, Any]
IGNORE, IMAGE = -100, -200


def facts(**changes: Any) -> Facts:
    """Of a text, a sample with an image, and a text of one token; 144 vision tokens, 50 words."""
    found: Facts = {
        "input_ids": [[1, 7, 8, 2], [1, IMAGE, 9, 49, 2], [3]],
        "labels": [[IGNORE, IGNORE, 8, 2], [IGNORE, IGNORE, IGNORE, 49, 2], [3]],
        "lengths": [4, 148, 1],
        "images": [-1, 0, -1],
        "query_rows": [0, 3, 0],
        "response_rows": [2, 2, 0],
        "vocabulary": 50,
        "num_vision": 144,
    }
    found |= changes
    for name in ("input_ids", "labels"):
        found[name] = [np.array(values, dtype=np.int32) for values in found[name]]
    return found


def put(name: str, sample: int, value: Any) -> Callable[[], Facts]:
    """One sample's fact is another."""

    def make() -> Facts:
        values = list(facts()[name])
        values[sample] = value
        return facts(**{name: values})

    return make


def test_what_a_writer_writes_agrees() -> None:
    assert disagreement(StoredSequences(**facts())) is None
    assert disagreement(StoredSequences(**facts(query_rows=None, response_rows=None))) is None


@pytest.mark.parametrize(
    ("change", "sample", "what"),
    [
        (put("input_ids", 0, []), 0, "1 empty sequences, expected 0"),
        (put("images", 0, 0), 0, "0 images among its ids, expected 1"),
        (put("images", 1, -1), 1, "1 images among its ids, expected 0"),
        (put("input_ids", 1, [1, IMAGE, IMAGE, 4, 2]), 1, "2 images among its ids, expected 1"),
        (put("input_ids", 0, [1, -7, 8, 2]), 0, "1 ids outside the vocabulary"),
        (put("input_ids", 2, [50]), 2, "1 ids outside the vocabulary"),
        (put("labels", 0, [IGNORE, IGNORE, 8, 10**6]), 0, "1 labels outside the vocabulary"),
        (put("labels", 1, [IGNORE, IMAGE, 1, 1, 2]), 1, "1 labels outside the vocabulary"),
        (put("labels", 1, [IGNORE, IGNORE, IGNORE, 50, 2]), 1, "1 labels outside the vocabulary"),
        (put("lengths", 1, 149), 1, "148 tokens with its image, expected 149"),
        (put("lengths", 2, 2), 2, "1 tokens with its image, expected 2"),
        (put("response_rows", 0, 1), 0, "1 response rows, expected 2"),
        (put("response_rows", 2, 1), 2, "1 response rows, expected 0"),
        (put("query_rows", 1, 2), 1, "2 query rows, expected 3"),
    ],
)
def test_what_does_not_agree_is_named(change: Callable[[], Facts], sample: int, what: str) -> None:
    found = disagreement(StoredSequences(**change()))

    assert found is not None
    assert found[0] == sample
    assert what in found[1]


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_a_batch_with_such_a_sample_is_refused_and_names_it(
    case: str, cache_path: Path, tmp_path: Path
) -> None:
    cache = open_cache(forge(cache_path, tmp_path, case).root)

    with pytest.raises(DamagedError, match=r"shard ref-000000: sample 's\d': .*expected") as error:
        cache.read_batch(cache.keys())

    assert any(repr(key) in str(error.value) for key in record(cache.root, "ref-000000").keys)
    assert f"Run cache-tools repair --decode {cache.root}" in str(error.value)
    result = invoke(cache_tools, "repair", "--decode", str(cache.root))
    assert "1 shards taken out; build again: ref-000000.tar" in result.stdout


def test_no_samples_are_an_empty_batch(cache: Cache) -> None:
    assert cache.read_batch([]).input_ids == []
