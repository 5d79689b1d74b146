"""The cache agrees with what the original code computed (`tests/reference`).

Everything goes through `build-cache` and `open_cache`, as a user's data would.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from shared.cache import Cache, open_cache
from shared.images import ImageProcessor, decode_image
from tests.support import CLIP, FULL, REFERENCE, command

CASES = {case["key"]: case for case in json.loads((REFERENCE / "golden.json").read_text())["cases"]}
WITH_IMAGE = [key for key, case in CASES.items() if case["has_image"]]
GOLDEN = load_file(REFERENCE / "golden.safetensors")


@pytest.fixture(scope="module")
def caches(packed_tars: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cache]:
    folder = tmp_path_factory.mktemp("reference")
    opened = {}
    for template in ("plain", "v1"):
        result = command(folder / template, packed_tars, {**FULL, "template": template})
        assert result.exit_code == 0, result.output
        opened[template] = open_cache(folder / template)
    return opened


def read(caches: dict[str, Cache], case: str) -> Any:
    template, key = case.split("/")
    return caches[template].read(key)


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def assert_close(found: Any, expected: Any) -> None:
    """Within 1e-4 of the largest value: the reference's own tolerance."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_ids_and_labels_are_the_originals(caches: dict[str, Cache], case: str) -> None:
    found = read(caches, case)

    np.testing.assert_array_equal(found.input_ids, GOLDEN[f"{case}/input_ids"])
    np.testing.assert_array_equal(found.labels, GOLDEN[f"{case}/labels"])
    assert found.vision_start == CASES[case].get("vision_start")


@pytest.mark.parametrize("case", CASES)
def test_lengths_are_those_of_the_expanded_sequences(caches: dict[str, Cache], case: str) -> None:
    template, key = case.split("/")

    place = caches[template].keys().index(key)
    assert caches[template].lengths[place] == CASES[case]["seq_len"]
    assert caches[template].with_image[place] == CASES[case]["has_image"]


@pytest.mark.parametrize("case", WITH_IMAGE)
def test_vision_tokens_are_the_originals(caches: dict[str, Cache], case: str) -> None:
    assert_close(read(caches, case).vision_tokens, GOLDEN[f"{case}/teacher/vision_tokens"])


@pytest.mark.parametrize("case", WITH_IMAGE)
def test_attention_is_the_originals(caches: dict[str, Cache], case: str) -> None:
    expected = GOLDEN[f"{case}/teacher/text_to_vision_attention"]

    assert_close(read(caches, case).attention[0], expected)
    assert expected.shape[1] == CASES[case]["n_text_rows"]


@pytest.mark.parametrize("case", WITH_IMAGE)
def test_top_16_vision_tokens_are_the_originals(caches: dict[str, Cache], case: str) -> None:
    weight = read(caches, case).attention[0].mean(axis=0).sum(axis=0)

    assert sorted(np.argsort(-weight)[:16].tolist()) == CASES[case]["top16"]


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_the_originals_logits(
    caches: dict[str, Cache], case: str
) -> None:
    found = read(caches, case)
    expected = log_softmax(GOLDEN[f"{case}/teacher/response_logits"])
    dense = np.full_like(expected, np.nan)
    np.put_along_axis(dense, found.top_ids.astype(np.int64), found.top_logprobs, axis=-1)

    assert_close(dense, expected)
    assert found.rest_logprobs is None  # k is the whole vocabulary
    assert (np.diff(found.top_logprobs, axis=-1) <= 0).all()


def test_a_text_only_sample_has_no_image_signals(caches: dict[str, Cache]) -> None:
    found = read(caches, "v1/text0")

    assert found.attention == {}
    assert found.vision_tokens is None


def test_plain_skips_what_has_several_turns_or_no_image(caches: dict[str, Cache]) -> None:
    skipped = {s.key: s.reason for r in caches["plain"].records.values() for s in r.skipped}

    assert set(skipped) == {"s2", "text0"}
    assert set(skipped.values()) == {"template plain takes one image and one caption"}


@pytest.mark.parametrize("case", [case for case in CASES if f"{case}/pixel_values" in GOLDEN])
def test_pixels_are_the_originals(case: str) -> None:
    entries = {e["id"]: e for e in json.loads((REFERENCE / "annotations.json").read_text())}
    image = REFERENCE / "images" / entries[case.split("/")[1]]["image"]

    pixels = ImageProcessor(CLIP, "pad")(decode_image(image.read_bytes()))

    np.testing.assert_allclose(pixels, GOLDEN[f"{case}/pixel_values"], rtol=1e-4, atol=1e-6)
