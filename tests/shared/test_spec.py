"""A spec says what is stored, and its digest changes with that and nothing else."""

import json
from pathlib import Path

import pytest
import yaml

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


def test_the_digest_does_not_depend_on_how_the_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    backwards = dict(reversed(FULL.items())) | {"max_tokens": 2048}  # the default, spelt out
    path.write_text("# a comment\n" + yaml.safe_dump(backwards, sort_keys=False))

    assert CacheSpec.load(path).digest == CacheSpec.from_dict(FULL).digest


@pytest.mark.parametrize(
    "change",
    [
        {"template": "plain"}, {"image_aspect": "square"}, {"max_tokens": 100},
        {"attention": None}, {"attention": {"layers": [1], "encoding": "float32"}},
        {"vision_tokens": {"encoding": "float16"}},
        {"logprobs": {"top_k": 3, "encoding": "float32"}},
    ],
)  # fmt: skip
def test_the_digest_changes_with_every_field(change: dict[str, object]) -> None:
    assert CacheSpec.from_dict({**FULL, **change}).digest != CacheSpec.from_dict(FULL).digest


def test_equal_values_have_equal_digests_whatever_their_order() -> None:
    assert canonical_digest({"a": 1, "é": [2]}) == canonical_digest({"é": [2], "a": 1})
    assert canonical_digest({"a": 1}) != canonical_digest({"a": "1"})


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        CacheSpec.from_dict(FULL).template = "plain"  # type: ignore[misc]


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens must be at least 2, found 1"):
        CacheSpec.from_dict({**FULL, "max_tokens": 1})
