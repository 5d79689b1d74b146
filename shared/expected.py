"""What the arrays of a shard have to be, by its identity (`cache_specs/format.md`, Arrays).

Compared once for each array, when it is opened: what reads rows afterwards need not ask what they
are.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from shared.array_layout import ArrayLayout
from shared.bounds import MAX_SAMPLES
from shared.encodings import ENCODINGS, id_dtype
from shared.spec import CacheSpec

IMAGE_SHA256 = "image_sha256"
"Array of the digests of a shard's distinct images; caches that were written without it are read."
_ANY = 2**63


class Expected(NamedTuple):
    """One array."""

    dtype: str
    "Of its values."
    row: tuple[int, ...]
    "Shape of one row."
    most: int = _ANY
    "Rows, at most: of arrays that are kept in memory as a whole."

    def difference(self, layout: ArrayLayout) -> str | None:
        """How a layout differs, or None."""
        found = f"{layout.dtype.name} {list(layout.shape)}"
        if layout.dtype.name != self.dtype or layout.shape[1:] != self.row:
            return f"is {found}, expected {self.dtype} [{', '.join(map(str, ('rows', *self.row)))}]"
        if layout.shape[0] > self.most:
            return f"is {found}, expected at most {self.most} rows"
        return None


def expected_arrays(spec: CacheSpec, teacher: Mapping[str, Any]) -> dict[str, Expected]:
    """Array name -> what it has to be.

    Args:
        teacher: that section of the identity.
    """
    arrays = {name: Expected("int32", ()) for name in ("input_ids", "labels")}
    for unit in ("token", "query", "response"):
        arrays[f"{unit}_offsets"] = Expected("int64", (), MAX_SAMPLES + 1)
    arrays[IMAGE_SHA256] = Expected("uint8", (32,), MAX_SAMPLES)
    vision = teacher["vision_tokens"]
    if spec.attention is not None:
        for layer in spec.attention.layers:
            shape = (teacher["attention_heads"], vision)
            arrays |= _signal(f"attention_{layer}", spec.attention.encoding, shape)
    if spec.vision_tokens is not None:
        shape = (vision, teacher["hidden_size"])
        arrays |= _signal("vision_tokens", spec.vision_tokens.encoding, shape)
    if spec.logprobs is not None:
        top_k = spec.logprobs.top_k
        arrays["top_ids"] = Expected(id_dtype(teacher["vocab_size"]).__name__, (top_k,))
        arrays |= _signal("top_logprobs", spec.logprobs.encoding, (top_k,))
        arrays["rest_logprobs"] = Expected("float32", ())
    return arrays


def _signal(name: str, encoding: str, shape: tuple[int, ...]) -> dict[str, Expected]:
    found = ENCODINGS[encoding]
    return {
        name + suffix: Expected(*found.stored(suffix, shape)) for suffix in ("", *found.siblings)
    }
