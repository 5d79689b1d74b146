"""A_tv: the attention of one decoder layer from text to vision tokens, for the needed rows only.

The rows of text after the image are a small part of a layer's attention map, and the map of every
other layer is never needed. So queries and keys are caught where the layer computes them, and the
rows are computed from those; every layer, the caught ones included, keeps its fast attention.

Axes: B sample, H head, T token, D head channel, Q text row, V vision token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaAttention, rotate_half

from shared.mobilevlm import NUM_VISION

_MOST_SCORES = 2**26
"Bytes of attention scores that are computed at once."


@dataclass(frozen=True, kw_only=True)
class QueryKey:
    """Queries and keys of one layer before rotary positions, as its projections give them."""

    query: Float[Tensor, "B P query_width"]
    "All heads side by side, of the positions from `first_query` on."
    key: Float[Tensor, "B T key_width"]
    "All key heads side by side (fewer than query heads under grouped-query attention)."
    cos: Float[Tensor, "_ T D"]
    "Rotary cosines; the first axis is 1 or B."
    sin: Float[Tensor, "_ T D"]
    "Rotary sines."
    first_query: int = 0
    "Position of the first query; those before it are not needed and may be left out."

    def only(self, keep: Bool[Tensor, " B"]) -> "QueryKey":
        """Of some samples only; rotary positions have to be the same for all."""
        return replace(self, query=self.query[keep], key=self.key[keep])


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
    row_BQ = vision_start[:, None] + NUM_VISION + torch.arange(num_rows, device=lengths.device)
    real_BQ = row_BQ < lengths[:, None]
    row_BQ = row_BQ.clamp(max=caught.key.shape[1] - 1)
    place_BQX = (row_BQ - caught.first_query)[..., None].expand(-1, -1, caught.query.shape[2])
    cos_BQD, sin_BQD = (
        part.expand(len(row_BQ), -1, -1).take_along_dim(row_BQ[..., None], dim=1)
        for part in (caught.cos, caught.sin)
    )
    # Scores in float32 whatever q and k are in, as fast attention adds them up; and scaled by way
    # of the queries, where there is less to scale.
    query_BHQD = _rotated(caught.query.gather(1, place_BQX), cos_BQD, sin_BQD).float()
    query_BHQD = query_BHQD * head_dim**-0.5
    key_BHTD = _rotated(caught.key, caught.cos, caught.sin).float()
    key_BHTD = key_BHTD.repeat_interleave(query_BHQD.shape[1] // key_BHTD.shape[1], dim=1)
    column_BV = vision_start[:, None] + torch.arange(NUM_VISION, device=row_BQ.device)
    # At 2,048 tokens, scores over all keys take 14 times the memory of the 144 columns wanted.
    score_bytes = 4 * key_BHTD.shape[0] * key_BHTD.shape[1] * key_BHTD.shape[2]
    each = max(1, _MOST_SCORES // max(1, score_bytes))
    if each >= num_rows:
        weight_BHQV = _weights(query_BHQD, key_BHTD, row_BQ, column_BV)
    else:
        blocks = zip(
            torch.split(query_BHQD, each, dim=2), torch.split(row_BQ, each, dim=1), strict=True
        )
        # Computed again for the gradient, or the scores of all blocks would be kept for it.
        keeps = query_BHQD.requires_grad or key_BHTD.requires_grad
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        run = partial(again, _weights) if keeps else _weights
        weight_BHQV = torch.cat([run(q, key_BHTD, row, column_BV) for q, row in blocks], dim=2)
    rows_BHQV: Tensor = weight_BHQV * real_BQ[:, None, :, None]
    return rows_BHQV


def _weights(
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B H T D"],
    row: Int[Tensor, "B Q"],
    column: Int[Tensor, "B V"],
) -> Float[Tensor, "B H Q V"]:
    """Softmax over the keys that each row sees, at the columns of the vision tokens."""
    score_BHQT = query @ key.transpose(2, 3)
    position = torch.arange(key.shape[2], device=row.device)
    hidden_BQT = position[None, None, :] > row[:, :, None]
    weight_BHQT = score_BHQT.masked_fill_(hidden_BQT[:, None], float("-inf")).softmax(dim=-1)
    place_BHQV = column[:, None, None, :].expand(-1, *weight_BHQT.shape[1:3], -1)
    return weight_BHQT.gather(3, place_BHQV)


def _rotated(
    projected: Float[Tensor, "B T X"], cos: Float[Tensor, "_ T D"], sin: Float[Tensor, "_ T D"]
) -> Float[Tensor, "B H T D"]:
    """Heads apart, and turned by their positions as `apply_rotary_pos_emb` of transformers does."""
    heads_BTHD = projected.reshape(*projected.shape[:2], -1, cos.shape[-1])
    turned: Tensor = heads_BTHD * cos[:, :, None] + rotate_half(heads_BTHD) * sin[:, :, None]
    return turned.transpose(1, 2)


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
        for layer, part in parts.items():
            caught[layer] = QueryKey(
                query=part["query"], key=part["key"], cos=part["cos"], sin=part["sin"]
            )
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
