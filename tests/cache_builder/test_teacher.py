"""The teacher's signals depend on the sample alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from cache_builder.teacher import top_k
from shared.cache import open_cache
from shared.capture import catch_query_key
from shared.checkpoint import ModelFolder
from shared.mobilevlm import load_model
from shared.prompt import IMAGE_TOKEN
from shared.sequence import splice
from tests.support import (
    CLIP,
    FULL,
    TEACHER,
    annotation,
    build,
    png,
    sample,
    text_sample,
    write_tar,
)

DEEP = {**FULL, "attention": {"layers": [0, 2], "encoding": "float32"}}


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of very different lengths, with and without image."""
    folder = tmp_path_factory.mktemp("teacher")
    samples = [
        sample("short", annotation("<image>", "no"), png(1)),
        text_sample("text", "what is the color", "blue"),
        sample("long", annotation("<image>\n" + "where is the boat " * 9, "left"), png(2)),
        sample("turns", annotation("<image>\nwhat", "red", "why", "so"), png(1)),
        text_sample("long-text", "what is the color of it " * 12, "blue and red"),
    ]
    return write_tar(folder / "t.tar", *samples)


@pytest.fixture(scope="module")
def alone(tar: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches of batches of one, by the teacher's number format."""
    folder = tmp_path_factory.mktemp("alone")
    for dtype in ("float32", "float64"):
        build(folder / dtype, tar, DEEP, batch_size=1, dtype=dtype)
    return {dtype: folder / dtype for dtype in ("float32", "float64")}


def assert_close(found: Any, expected: Any, within: float) -> None:
    assert np.abs(found - expected).max() <= within * np.abs(expected).max()


# In float32 a matrix product rounds differently for another batch shape, and this random teacher's
# sharp softmaxes (weights down to 1e-27) enlarge that. In float64 only a real leak would be left.
@pytest.mark.parametrize(("dtype", "within"), [("float64", 1e-7), ("float32", 2e-5)])
@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_what_else_is_in_the_batch_leaves_no_trace(
    tar: Path, alone: dict[str, Path], tmp_path: Path, batch_size: int, dtype: str, within: float
) -> None:
    build(tmp_path / "cache", tar, DEEP, batch_size=batch_size, dtype=dtype)
    batched, single = open_cache(tmp_path / "cache"), open_cache(alone[dtype])

    assert batched.keys() == single.keys()
    for key in single.keys():  # noqa: SIM118  (a Cache is not a dict)
        found, expected = batched.read(key), single.read(key)
        np.testing.assert_array_equal(found.input_ids, expected.input_ids)
        assert found.attention.keys() == expected.attention.keys()
        for layer, values in expected.attention.items():
            assert_close(found.attention[layer], values, within)
        if expected.vision_tokens is not None:
            assert_close(found.vision_tokens, expected.vision_tokens, within)
        assert_close(by_token(found), by_token(expected), within)


def by_token(found: Any) -> Any:
    """Log-probabilities in the vocabulary's order: near ties may be listed either way round."""
    return np.take_along_axis(found.top_logprobs, found.top_ids.argsort(axis=-1), axis=-1)


@pytest.mark.parametrize("key", ["short", "long", "turns"])
def test_every_layers_attention_is_that_of_the_eager_model(
    alone: dict[str, Path], key: str
) -> None:
    """transformers' own eager attention maps of the whole model, cut to text rows and image."""
    found = open_cache(alone["float32"]).read(key)
    model = load_model(ModelFolder(str(TEACHER)), str(CLIP))
    assert isinstance(model.llm, LlamaForCausalLM)
    model.llm.set_attn_implementation("eager")
    assert found.vision_tokens is not None
    embedded = splice(
        model.llm.get_input_embeddings(),
        found.input_ids.tolist(),
        torch.from_numpy(found.vision_tokens),
    )
    with torch.inference_mode():
        maps = model.llm(inputs_embeds=embedded[None], output_attentions=True).attentions

    start = found.input_ids.tolist().index(IMAGE_TOKEN)
    for layer in (0, 2):
        expected = maps[layer][0, :, start + 144 :, start : start + 144].numpy()
        np.testing.assert_allclose(found.attention[layer], expected, rtol=1e-3, atol=1e-6)


def test_catching_a_layer_that_is_not_run_is_an_error() -> None:
    model = load_model(ModelFolder(str(TEACHER)), str(CLIP))

    with pytest.raises(IndexError), catch_query_key(model.llm.model.layers, [9]):
        pass


@given(st.integers(1, 11), st.integers(0, 2**31), st.floats(0.1, 60))
def test_top_k_and_the_rest_are_the_whole_distribution(k: int, seed: int, scale: float) -> None:
    logits = scale * torch.randn(3, 11, generator=torch.Generator().manual_seed(seed))

    ids, logprobs, rest = top_k(logits, torch.eye(11), k)

    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), expected.gather(-1, ids), rtol=1e-5, atol=1e-5)
    left = expected.scatter(-1, ids, -torch.inf).logsumexp(-1)
    if k == 11:
        assert rest is None
    else:
        assert rest is not None
        torch.testing.assert_close(rest.double(), left, rtol=1e-5, atol=1e-5)
    assert (expected.scatter(-1, ids, -torch.inf).amax(-1) <= expected.gather(-1, ids)[:, -1]).all()


def test_the_rest_is_exact_where_the_top_hold_nearly_everything() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0]])

    _, _, rest = top_k(logits, torch.eye(3), 1)

    assert rest is not None
    assert rest.item() == pytest.approx(np.log(2) - 40, rel=1e-5)  # log(1 - p) would be -inf


def test_top_k_does_not_depend_on_how_many_rows_are_computed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(7, 16), torch.randn(50, 16)
    expected = top_k(hidden, head, 5)

    monkeypatch.setattr("cache_builder.teacher._MOST_LOGITS", 3 * 4 * 50)
    found = top_k(hidden, head, 5)

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    none = top_k(hidden[:0], head, 5)
    assert [part.shape for part in none if part is not None] == [(0, 5), (0, 5), (0,)]


def test_logits_of_a_half_precision_teacher_are_not_rounded() -> None:
    torch.manual_seed(0)
    hidden, head = (3 * torch.randn(n, 64).to(torch.bfloat16) for n in (9, 200))

    ids, logprobs, _ = top_k(hidden, head, 20)

    exact = (hidden.double() @ head.double().T).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), exact.gather(-1, ids), rtol=1e-5, atol=1e-4)
    rounded = (hidden @ head.T).float().log_softmax(-1).double()
    assert (rounded - exact).abs().max() > 0.1
