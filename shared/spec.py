"""What a cache holds: the spec, and nothing about how it is produced.

Two builds with equal specs, teachers and tars give the same content, so the spec is part of every
shard's identity. Batch size, device count and workers are not in it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from shared.bounds import MAX_LAYERS, MAX_TOKENS, MAX_TOP_K, check_range
from shared.encodings import AttentionEncoding, LogprobEncoding, VisionEncoding
from shared.strict import find_yaml, parse, read_yaml, shown

Template = Literal["plain", "v1"]
Aspect = Literal["pad", "square"]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """A_tv: text-to-vision attention weights of some decoder layers."""

    layers: tuple[int, ...]
    "Decoder layers of the teacher, counted from 0; the paper uses [0]."
    encoding: AttentionEncoding
    "How each weight is stored."

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers is empty; leave `attention` out to store none")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must be distinct, found {shown(list(self.layers))}")
        for layer in self.layers:
            check_range("each of layers", layer, 0, MAX_LAYERS - 1)


@dataclass(frozen=True, kw_only=True)
class VisionTokensSpec:
    """v: the vision tokens after the projector, once per distinct image of a tar."""

    encoding: VisionEncoding
    "How each value is stored."


@dataclass(frozen=True, kw_only=True)
class LogprobsSpec:
    """The teacher's distribution at response positions: k largest entries and the rest's mass."""

    top_k: int
    "Entries kept per response position; exact when it equals the vocabulary size."
    encoding: LogprobEncoding
    "How each log-probability (nats) is stored; ids take the smallest type for the vocabulary."

    def __post_init__(self) -> None:
        check_range("top_k", self.top_k, 1, MAX_TOP_K)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """One cache: the sequence that the teacher sees and the signals that are kept of it."""

    template: Template
    "Prompt template: `plain` (stage I) or `v1` (stage II)."
    image_aspect: Aspect
    "`pad`: to a square with the mean colour; `square`: the image processor's own resize and crop."
    max_tokens: int = 2048
    "Longest sequence in tokens, vision tokens counted; a longer sample is skipped and listed."
    attention: AttentionSpec | None = None
    "Text-to-vision attention, or none."
    vision_tokens: VisionTokensSpec | None = None
    "Projected vision tokens, or none."
    logprobs: LogprobsSpec | None = None
    "Log-probabilities at response positions, or none."

    def __post_init__(self) -> None:
        check_range("max_tokens", self.max_tokens, 2, MAX_TOKENS)
        if not (self.attention or self.vision_tokens or self.logprobs):
            raise ValueError(
                "names no signal: give at least one of attention, vision_tokens, logprobs"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "spec") -> "CacheSpec":
        """Strict: an unknown key raises ConfigError and names the nearest known one."""
        return parse(cls, values, where)

    @classmethod
    def load(cls, name: str | Path) -> "CacheSpec":
        """From a YAML file, or by the name of a spec that ships: `default`, `small`, ....

        Raises:
            ConfigError: not there, not readable, not YAML, or not a spec.
        """
        path = find_yaml(name, resources.files("cache_specs"), "spec")
        return cls.from_dict(read_yaml(path), where=str(path))

    def exact(self) -> "CacheSpec":
        """The same signals, as the teacher gives them."""
        floats = {name: replace(getattr(self, name), encoding="float32") for name in self.encodings}
        return replace(self, **floats)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as records hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Teacher layers whose attention is stored; empty if none."""
        return self.attention.layers if self.attention else ()

    @property
    def encodings(self) -> dict[str, str]:
        """Signal -> its encoding, of the signals that are stored."""
        signals = {
            "attention": self.attention, "vision_tokens": self.vision_tokens,
            "logprobs": self.logprobs,
        }  # fmt: skip
        return {name: signal.encoding for name, signal in signals.items() if signal is not None}


def canonical_digest(values: object) -> str:
    """sha256 of JSON with sorted keys and no spaces: equal values, equal digest."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
