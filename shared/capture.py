"""A_tv: the attention of one decoder layer from text to vision tokens, for the needed rows only.

The rows of text after the image are a small part of a layer's attention map, and the map of every
other layer is never needed. So queries and keys are caught where the layer computes them, and the
rows are computed from those; every layer, the caught ones included, keeps its fast attention.

Axes: B sample, H head, T token, D head channel, Q text row, V vision token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from shared.mobilevlm import NUM_VISION


@dataclass(frozen=True, kw_only=True)
class QueryKey:
    """Queries and keys of one layer before rotary positions, as its projections give them."""

    query: Float[Tensor, "B T query_width"]
    "All heads side by side."
    key: Float[Tensor, "B T key_width"]
    "All key heads side by side (fewer than query heads under grouped-query attention)."
    cos: Float[Tensor, "_ T D"]
    "Rotary cosines; the first axis is 1 or B."
    sin: Float[Tensor, "_ T D"]
    "Rotary sines."


def text_to_vision(
    caught: QueryKey,
    vision_start: Int[Tensor, " B"],
    lengths: Int[Tensor, " B"],
    num_rows: int,
) -> Float[Tensor, "B H Q V"]:
    """Attention weights from text positions after the image to the vision tokens, in float32.

    Softmax runs over all visible keys, as in the layer itself, so rows sum to less than 1.

    Args:
        vision_start: first vision position of each sample; every sample must have an image.
        lengths: tokens of each sample.
        num_rows: Q, the most text rows of any sample; rows past a sample's end are zero.
    """
    head_dim = caught.cos.shape[-1]
    query, key = _rotate(caught, head_dim)
    row_BQ = vision_start[:, None] + NUM_VISION + torch.arange(num_rows, device=query.device)
    real_BQ = row_BQ < lengths[:, None]
    row_BQ = row_BQ.clamp(max=query.shape[2] - 1)
    query_BHQD = query.gather(2, row_BQ[:, None, :, None].expand(-1, query.shape[1], -1, head_dim))
    key_BHTD = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    score_BHQT = (query_BHQD @ key_BHTD.transpose(2, 3)).float() * head_dim**-0.5
    position = torch.arange(key.shape[2], device=key.device)
    hidden_BQT = position[None, None, :] > row_BQ[:, :, None]
    weight_BHQT = score_BHQT.masked_fill(hidden_BQT[:, None], float("-inf")).softmax(dim=-1)
    column_BV = vision_start[:, None] + torch.arange(NUM_VISION, device=key.device)
    weight_BHQV = weight_BHQT.gather(
        3, column_BV[:, None, None, :].expand(-1, weight_BHQT.shape[1], num_rows, -1)
    )
    rows_BHQV: Tensor = weight_BHQV * real_BQ[:, None, :, None]
    return rows_BHQV


def _rotate(caught: QueryKey, head_dim: int) -> tuple[Tensor, Tensor]:
    query = caught.query.reshape(*caught.query.shape[:2], -1, head_dim).transpose(1, 2)
    key = caught.key.reshape(*caught.key.shape[:2], -1, head_dim).transpose(1, 2)
    rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb(query, key, caught.cos, caught.sin)
    return rotated


@contextmanager
def catch_query_key(
    layers: nn.ModuleList, wanted: Sequence[int]
) -> Iterator[Mapping[int, QueryKey]]:
    """Catch queries and keys of the `wanted` layers during one forward pass.

    Hooks only keep references, so gradient checkpointing recomputes the layer as it was; and they
    are gone when the block ends, so that the recomputation is not caught a second time.
    """
    parts: dict[int, dict[str, Tensor]] = {layer: {} for layer in wanted}
    caught: dict[int, QueryKey] = {}
    handles = []
    for layer in wanted:
        attention = layers[layer].self_attn
        assert isinstance(attention, LlamaAttention)
        handles += _hook(attention, parts[layer])
    try:
        yield caught
        caught.update({layer: QueryKey(**found) for layer, found in parts.items()})
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    attention: LlamaAttention, found: dict[str, Tensor]
) -> list[torch.utils.hooks.RemovableHandle]:
    def positions(_module: nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
        found["cos"], found["sin"] = kwargs["position_embeddings"]

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            found[name] = output

        return hook

    return [
        attention.register_forward_pre_hook(positions, with_kwargs=True),
        attention.q_proj.register_forward_hook(keep("query")),
        attention.k_proj.register_forward_hook(keep("key")),
    ]
