"""The rows that `shared.capture` computes are those of transformers' eager attention."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from shared.capture import QueryKey, catch_query_key, text_to_vision

VISION = 144


def llama(key_heads: int = 4, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=key_heads, max_position_embeddings=512, **fields,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch(*shapes: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, vision starts and lengths of samples with (tokens before, after) the image."""
    lengths = torch.tensor([before + VISION + after for before, after in shapes])
    starts = torch.tensor([before for before, _ in shapes])
    torch.manual_seed(1)
    return torch.randn(len(shapes), int(lengths.max()), 32), starts, lengths


def caught_rows(
    model: LlamaForCausalLM, wanted: Sequence[int], inputs: tuple[Tensor, Tensor, Tensor]
) -> dict[int, Tensor]:
    embeds, starts, lengths = inputs
    rows = int((lengths - starts - VISION).max())
    with catch_query_key(model.model.layers, wanted) as caught:
        model(inputs_embeds=embeds)
    return {layer: text_to_vision(found, starts, lengths, rows) for layer, found in caught.items()}


def eager_rows(
    model: LlamaForCausalLM, layer: int, inputs: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Cut out of whole eager maps, row by row, padded with zeros."""
    embeds, starts, lengths = inputs
    model.set_attn_implementation("eager")
    maps = model(inputs_embeds=embeds, output_attentions=True).attentions[layer]
    rows = int((lengths - starts - VISION).max())
    cut = []
    for found, start, length in zip(maps, starts.tolist(), lengths.tolist(), strict=True):
        real = found[:, start + VISION : length, start : start + VISION]
        cut.append(nn.functional.pad(real, (0, 0, 0, rows - real.shape[1])))
    return torch.stack(cut)


SHAPES = [(1, 5), (7, 1), (3, 20)]


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_rows_are_those_of_eager_attention(key_heads: int, layer: int) -> None:
    inputs = batch(*SHAPES)
    found = caught_rows(llama(key_heads), [layer], inputs)[layer]

    expected = eager_rows(llama(key_heads), layer, inputs)

    assert found.shape == (3, 4, 20, VISION)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fields", [{"head_dim": 16}, {"attention_bias": True}])
def test_rows_are_right_for_other_head_sizes_and_for_biases(fields: dict[str, Any]) -> None:
    inputs = batch(*SHAPES)

    found = caught_rows(llama(2, **fields), [1], inputs)[1]

    expected = eager_rows(llama(2, **fields), 1, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("layer", [0, 2])
def test_gradients_are_those_of_eager_attention(key_heads: int, layer: int) -> None:
    inputs = batch(*SHAPES)
    ours, eager = llama(key_heads), llama(key_heads)
    torch.manual_seed(2)
    weight = torch.randn(3, 4, 20, VISION)

    (caught_rows(ours, [layer], inputs)[layer] * weight).sum().backward()
    (eager_rows(eager, layer, inputs) * weight).sum().backward()

    compared = 0
    for (name, found), expected in zip(ours.named_parameters(), eager.parameters(), strict=True):
        if expected.grad is None or not expected.grad.any():
            assert found.grad is None or not found.grad.any(), name
            continue
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
        compared += 1
    assert compared >= 3  # norm, q and k at least


def gradients(model: LlamaForCausalLM, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    embeds, starts, lengths = inputs
    model.train()
    with catch_query_key(model.model.layers, [0, 1]) as caught:
        logits = model(inputs_embeds=embeds.requires_grad_()).logits
    loss = logits.square().mean()
    for number, found in caught.items():
        loss = loss + (1 + number) * text_to_vision(found, starts, lengths, 20).square().sum()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_gradients_are_the_same_under_gradient_checkpointing() -> None:
    plain, saving = llama(2), llama(2)
    saving.activation_checkpointing_enable({"use_reentrant": False})
    assert saving.is_activation_checkpointing

    expected, found = gradients(plain, batch(*SHAPES)), gradients(saving, batch(*SHAPES))

    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_capturing_leaves_no_hook_and_changes_no_output() -> None:
    model, inputs = llama(), batch(*SHAPES)
    before = model(inputs_embeds=inputs[0]).logits

    with catch_query_key(model.model.layers, [0, 2]) as caught:
        during = model(inputs_embeds=inputs[0]).logits

    assert torch.equal(before, during)
    assert set(caught) == {0, 2}
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)


def test_hooks_are_gone_after_an_error_too() -> None:
    model = llama()

    with pytest.raises(RuntimeError, match="boat"), catch_query_key(model.model.layers, [0]):
        raise RuntimeError("boat")

    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_padding_and_other_samples_do_not_reach_a_samples_rows() -> None:
    embeds, starts, lengths = batch(*SHAPES)
    clean = caught_rows(llama(), [0], (embeds, starts, lengths))[0]
    for row, length in enumerate(lengths.tolist()):
        embeds[row, length:] = 1e4

    found = caught_rows(llama(), [0], (embeds, starts, lengths))[0]

    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    for row, (_, after) in enumerate(SHAPES):
        assert not found[row, :, after:].any()


@pytest.mark.parametrize("first", [1 + VISION, 17])
def test_queries_before_the_first_text_row_are_not_needed(first: int) -> None:
    embeds, starts, lengths = batch(*SHAPES)
    model = llama()
    with catch_query_key(model.model.layers, [0]) as caught:
        model(inputs_embeds=embeds)
    whole = caught[0]
    late = replace(whole, query=whole.query[:, first:], first_query=first)

    found = text_to_vision(late, starts, lengths, 20)

    assert torch.equal(found, text_to_vision(whole, starts, lengths, 20))


def test_weights_of_half_precision_inputs_are_computed_in_float32() -> None:
    torch.manual_seed(0)
    width, tokens = 8, VISION + 4
    caught = QueryKey(
        query=torch.randn(1, tokens, 2 * width, dtype=torch.bfloat16),
        key=torch.randn(1, tokens, width, dtype=torch.bfloat16),
        cos=torch.ones(1, tokens, width, dtype=torch.bfloat16),
        sin=torch.zeros(1, tokens, width, dtype=torch.bfloat16),
    )

    found = text_to_vision(caught, torch.tensor([1]), torch.tensor([tokens]), 3)

    exact = QueryKey(
        query=caught.query.float(), key=caught.key.float(), cos=caught.cos.float(),
        sin=caught.sin.float(),
    )  # fmt: skip
    expected = text_to_vision(exact, torch.tensor([1]), torch.tensor([tokens]), 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert (found.sum(-1) < 1).all()


def test_rows_and_gradients_do_not_depend_on_how_many_are_computed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = batch(*SHAPES)
    rows = caught_rows(llama(2), [0, 1], inputs)
    expected = gradients(llama(2), inputs)

    # Scores of three rows: 4 bytes, 3 samples, 4 heads, all tokens.
    monkeypatch.setattr("shared.capture._MOST_SCORES", 3 * 4 * 3 * 4 * inputs[0].shape[1])
    embeds = inputs[0].detach()
    found = caught_rows(llama(2), [0, 1], (embeds, *inputs[1:]))
    again = gradients(llama(2), (embeds.clone(), *inputs[1:]))

    for layer, values in rows.items():
        torch.testing.assert_close(found[layer], values)
    assert again.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


def test_scores_of_all_rows_are_not_kept_for_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch((3, 200), (5, 180))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    def largest() -> int:
        kept.clear()
        model = llama(2)
        with catch_query_key(model.model.layers, [0]) as caught:
            model(inputs_embeds=inputs[0])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            text_to_vision(caught[0], *inputs[1:], 200)
        return max(kept)

    tokens = inputs[0].shape[1]
    assert largest() >= 2 * 4 * 200 * tokens

    monkeypatch.setattr("shared.capture._MOST_SCORES", 10 * 4 * 2 * 4 * tokens)
    assert largest() <= 2 * 4 * 200 * VISION
