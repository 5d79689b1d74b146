"""A spec says what is stored; what makes no sense is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from shared import bounds
from shared.array_layout import MAX_CHUNK_BYTES
from shared.encodings import ENCODINGS
from shared.errors import ConfigError
from shared.spec import CacheSpec, canonical_digest
from tests.support import FULL

SHIPPED = sorted(Path(__file__).parents[2].joinpath("cache_specs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_spec_that_ships_loads(path: Path) -> None:
    assert CacheSpec.load(path).attention_layers == (0,)


def test_a_spec_survives_json() -> None:
    spec = CacheSpec.from_dict(FULL)

    assert CacheSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_spec_does_not_depend_on_how_the_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    backwards = dict(reversed(FULL.items())) | {"max_tokens": 2048}  # the default, spelt out
    path.write_text("# a comment\n" + yaml.safe_dump(backwards, sort_keys=False))

    assert CacheSpec.load(path).to_dict() == CacheSpec.from_dict(FULL).to_dict()


def test_equal_values_have_equal_digests_whatever_their_order() -> None:
    assert canonical_digest({"a": 1, "é": [2]}) == canonical_digest({"é": [2], "a": 1})
    assert canonical_digest({"a": 1}) != canonical_digest({"a": "1"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 1}, "max_tokens must be 2 to 2147483647, found 1"),
        ({"max_tokens": 2**31}, "max_tokens must be 2 to 2147483647, found 2147483648"),
        ({"logprobs": {"top_k": 0, "encoding": "float32"}}, "top_k must be 1 to 33554432, found 0"),
        ({"logprobs": {"top_k": 2**25 + 1, "encoding": "float32"}}, "found 33554433"),
        ({"attention": {"layers": [0, 1000], "encoding": "float32"}}, "0 to 999, found 1000"),
        ({"attention": {"layers": [-1], "encoding": "float32"}}, "0 to 999, found -1"),
        ({"attention": {"layers": [1, 1], "encoding": "float32"}}, "distinct, found [1, 1]"),
        ({"attention": {"layers": [], "encoding": "float32"}}, "layers is empty"),
    ],
)
def test_numbers_out_of_their_range_are_refused_and_the_range_is_named(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        CacheSpec.from_dict({**FULL, **change})


def test_the_largest_numbers_are_those_that_a_reader_takes() -> None:
    assert bounds.MAX_TOP_K * np.dtype(np.float32).itemsize == MAX_CHUNK_BYTES
    arrays = 1 + max(len(encoding.siblings) for encoding in ENCODINGS.values())
    layer = [f"{number}/{file}" for number in range(arrays) for file in ("zarr.json", "c")]
    bounds.check_files([f"attention_{n}-{f}" for n in range(bounds.MAX_LAYERS) for f in layer])
    bounds.check_samples(["a"], [bounds.MAX_TOKENS], [-1])
