"""The teacher, loaded and run only as deep as the spec needs.

First-layer attention and vision tokens need the tower, the projector, the token embeddings and one
layer's norm, q and k projections: about 1/200 of a 7B decoder's arithmetic. Tensors that the spec
does not need are not read, and the files that hold only those need not exist.

Axes: B sample, N image, H head, Q text row (of all samples), V vision token, C channel,
R response position, K top-k entry.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shared.capture import QueryKey, text_to_vision
from shared.checkpoint import ModelFolder, weights_digest
from shared.errors import ConfigError
from shared.memory import fitting
from shared.mobilevlm import (
    NUM_VISION,
    VLMConfig,
    empty_model,
    load_state,
    read_config,
    read_tower,
    to_published,
)
from shared.progress import announced
from shared.sequence import SequenceBatch
from shared.spec import CacheSpec, canonical_digest

_COSMETIC = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
"Config fields that change no value."

_MOST_LOGITS = 2**26
"Bytes of logits that are computed at once."


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What the teacher says about one batch. Text-only samples have no attention."""

    attention: dict[int, Float[Tensor, "Q H V"]]
    "Layer -> A_tv: text rows of the samples with an image, one sample after another."
    top_ids: Int[Tensor, "R K"] | None
    "Likeliest tokens at the response positions of all samples, one after another."
    top_logprobs: Float[Tensor, "R K"] | None
    "Their log-probabilities in nats."
    rest_logprobs: Float[Tensor, " R"] | None
    "Log of the mass outside the top k; None if k is the whole vocabulary."


class Teacher:
    """A frozen MobileVLM, possibly without its later layers."""

    def __init__(
        self,
        folder: ModelFolder,
        spec: CacheSpec,
        *,
        vision_tower: str | None = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Load what `spec` needs.

        Raises:
            CheckpointError: config or tensors are missing or do not fit.
            ConfigError: the spec asks for a layer or a k that the teacher does not have, or the
                device has too little memory.
        """
        self.config = read_config(folder, vision_tower)
        check_spec(spec, self.config)
        self._spec = spec
        self._device = device
        self._dtype = dtype
        self._model = empty_model(self.config, decoder_layers=decoder_depth(spec, self.config))
        needed = needed_tensors(spec, self.config)
        state = _read(folder, self.config, needed)
        load_state(self._model, state, folder.name, needed=needed, dtype=dtype)
        self.weights_sha256 = weights_digest(state)
        "Over the tensors that are used."
        _drop_unloaded(self._model)
        advice = "a spec without logprobs (align-only) loads a small part of it"
        with (
            announced(f"moving the teacher to {device}"),
            fitting(f"{folder.name}: needs", device, advice, ConfigError),
        ):
            self._model.to(device).eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    @property
    def vocabulary(self) -> int:
        """Tokens that it knows."""
        return int(self.config.llama.vocab_size)

    @property
    def identity(self) -> dict[str, Any]:
        """What of the teacher decides the bytes; nothing of where it lies."""
        return {
            **teacher_facts(self.config),
            "config_sha256": config_digest(self.config),
            "weights_sha256": self.weights_sha256,
        }

    @property
    def numerics(self) -> dict[str, str]:
        """Number format and attention code of the forward pass."""
        return {"dtype": str(self._dtype).removeprefix("torch."), "attention": "sdpa"}

    @torch.inference_mode()
    def vision_tokens(self, pixels: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N V C"]:
        """Projected vision tokens, in the teacher's dtype."""
        # Moved first: the device converts faster, and what is pinned is copied as it lies.
        there = pixels.to(self._device, non_blocking=True).to(self._dtype)
        tokens: Tensor = self._model.encode_images(there)
        return tokens

    @torch.inference_mode()
    def signals(self, batch: SequenceBatch, vision: Sequence[Float[Tensor, "V C"]]) -> Signals:
        """Attention and log-probabilities of one batch.

        Args:
            vision: vision tokens of each sample that has an image, in batch order; on any device.
        """
        # Before the batch moves: no wait for the device.
        num_rows = int(batch.num_text_rows.max())
        first_row = batch.first_text_row
        batch = batch.to(self._device)
        attention: dict[int, Tensor] = {}
        last = None
        for hidden, layer, caught in self._decode(batch, self._joined(vision), first_row):
            last = hidden
            if caught is not None and num_rows:
                attention[layer] = _image_attention(caught, batch, num_rows)
        top_ids = top_logprobs = rest = None
        if self._spec.logprobs is not None and last is not None:
            final = self._model.llm.model.norm(last)[batch.response_mask]
            weight = self._model.llm.lm_head.weight
            top_ids, top_logprobs, rest = top_k(final, weight, self._spec.logprobs.top_k)
        return Signals(
            attention=attention, top_ids=top_ids, top_logprobs=top_logprobs, rest_logprobs=rest
        )

    def _joined(self, vision: Sequence[Tensor]) -> Float[Tensor, "N V C"]:
        if vision:
            return torch.stack([tokens.to(self._device) for tokens in vision])
        return torch.zeros(0, NUM_VISION, self.config.llama.hidden_size, device=self._device)

    def _decode(
        self, batch: SequenceBatch, vision: Tensor, first_row: int
    ) -> Iterator[tuple[Tensor, int, QueryKey | None]]:
        """(output, layer number, its queries and keys if wanted), no deeper than needed."""
        wanted = self._spec.attention_layers
        if not wanted and self._spec.logprobs is None:
            return
        llama = self._model.llm.model
        hidden = self._model.embed(batch.ids, batch.vision_mask, vision)
        position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        cos, sin = llama.rotary_emb(hidden, position_ids=position_ids)
        for number, layer in enumerate(llama.layers):
            caught = None
            if number in wanted:
                normed = layer.input_layernorm(hidden)
                attention = layer.self_attn
                caught = QueryKey(
                    query=attention.q_proj(normed[:, first_row:]), first_query=first_row,
                    key=attention.k_proj(normed), cos=cos, sin=sin,
                )  # fmt: skip
            deepest = self._spec.logprobs is None and number == max(wanted)
            if not deepest:
                hidden = layer(hidden, position_embeddings=(cos, sin), position_ids=position_ids)
            yield hidden, number, caught


def top_k(
    hidden: Float[Tensor, "R C"], head: Float[Tensor, "vocab C"], k: int
) -> tuple[Int[Tensor, "R K"], Float[Tensor, "R K"], Float[Tensor, " R"] | None]:
    """Ids and log-probabilities of the k largest logits, and the log-probability of all others.

    Logits are float32 whatever the teacher is in: in bfloat16 they would tie, and be off by more
    than 8 bits lose. Not for all rows at once: one row of 32,000 takes 128 kB, three times.
    """
    kind = torch.promote_types(hidden.dtype, torch.float32)
    weight = head.to(kind)
    each = max(1, _MOST_LOGITS // (4 * len(weight)))
    blocks = [_top_k((rows.to(kind) @ weight.T).float(), k) for rows in torch.split(hidden, each)]
    ids, logprobs, rest = zip(*blocks, strict=True)
    return torch.cat(ids), torch.cat(logprobs), None if rest[0] is None else torch.cat(rest)


def _top_k(logits: Float[Tensor, "R vocab"], k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    logprobs = logits.log_softmax(dim=-1)
    top_logprobs, top_ids = logprobs.topk(k, dim=-1)
    if k == logits.shape[-1]:
        return top_ids, top_logprobs, None
    # Not log(1 - sum): that is rounding noise where the top k hold nearly everything.
    rest = logprobs.scatter(-1, top_ids, float("-inf")).logsumexp(dim=-1)
    return top_ids, top_logprobs, rest


def check_spec(spec: CacheSpec, config: VLMConfig) -> None:
    """Refuse a spec that asks for more than the teacher has.

    Raises:
        ConfigError: names the value and the teacher's.
    """
    depth, vocabulary = config.llama.num_hidden_layers, config.llama.vocab_size
    if max(spec.attention_layers, default=0) >= depth:
        raise ConfigError(
            f"spec: attention layer {max(spec.attention_layers)}, but the teacher has layers 0 to "
            f"{depth - 1}"
        )
    if spec.logprobs is not None and spec.logprobs.top_k > vocabulary:
        raise ConfigError(
            f"spec: top_k {spec.logprobs.top_k}, but the teacher's vocabulary has {vocabulary} "
            "tokens"
        )


def decoder_depth(spec: CacheSpec, config: VLMConfig) -> int:
    """Decoder layers that are built: all for log-probabilities, else up to the deepest wanted."""
    if spec.logprobs is not None:
        return int(config.llama.num_hidden_layers)
    return max(spec.attention_layers, default=-1) + 1


def needed_tensors(spec: CacheSpec, config: VLMConfig) -> set[str]:
    """Published names of the tensors that the spec needs."""
    names = {
        to_published(name)
        for name in empty_model(config, decoder_layers=decoder_depth(spec, config)).state_dict()
    }
    if spec.logprobs is not None:
        return names
    names -= {"lm_head.weight", "model.norm.weight"}
    if not spec.attention_layers:
        return names - {"model.embed_tokens.weight"}
    deepest = f"model.layers.{max(spec.attention_layers)}."
    used = ("input_layernorm.", "self_attn.q_proj.", "self_attn.k_proj.")
    return {
        name
        for name in names
        if not name.startswith(deepest) or name.removeprefix(deepest).startswith(used)
    }


def teacher_facts(config: VLMConfig) -> dict[str, int]:
    """Sizes of the teacher that a student has to fit."""
    return {
        "hidden_size": config.llama.hidden_size,
        "attention_heads": config.llama.num_attention_heads,
        "vocab_size": config.llama.vocab_size,
        "vision_tokens": NUM_VISION,
    }


def config_digest(config: VLMConfig) -> str:
    """sha256 over the fields of config.json and of the tower's config that can change a value."""
    published = {key: value for key, value in config.published.items() if key not in _COSMETIC}
    published.pop("mm_vision_tower", None)  # a path or an id; the tower's own config is hashed
    tower = {key: value for key, value in config.tower.to_dict().items() if key not in _COSMETIC}
    return canonical_digest({"model": published, "tower": tower})


def _image_attention(
    caught: QueryKey, batch: SequenceBatch, num_rows: int
) -> Float[Tensor, "Q H V"]:
    keep = batch.with_image
    start, lengths = batch.vision_start[keep], batch.lengths[keep]
    weight_NHQV = text_to_vision(caught.only(keep), start, lengths, num_rows)
    real_NQ = torch.arange(num_rows, device=lengths.device) < batch.num_text_rows[keep][:, None]
    return weight_NHQV.transpose(1, 2)[real_NQ]


def _read(folder: ModelFolder, config: VLMConfig, needed: set[str]) -> dict[str, Tensor]:
    inside = needed & set(folder.tensor_files())
    state = folder.read(inside)
    if not any(".vision_tower." in name for name in inside):
        state |= {name: t for name, t in read_tower(config).items() if name in needed}
    return state


def _drop_unloaded(model: torch.nn.Module) -> None:
    """Remove modules that got no weights, so that `.to(device)` has nothing without memory."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            parameters = list(child.parameters())
            if parameters and all(parameter.is_meta for parameter in parameters):
                setattr(module, name, None)
