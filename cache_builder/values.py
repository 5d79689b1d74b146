"""What a cached sample's values have to be like, whatever the teacher."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.cache import CachedSample
from shared.expected import IMAGE_SHA256
from shared.prompt import IGNORE, IMAGE_TOKEN
from shared.reader import ShardReader
from shared.spec import CacheSpec

_MOST = 1.1
"A probability and a sum of some, with room for the coarsest encodings' rounding."
_MOST_LOGPROB = 0.01
"The same for a logarithm, in nats."


def wrong_value(
    sample: CachedSample, spec: CacheSpec, teacher: Mapping[str, Any], length: int
) -> str | None:
    """What is wrong with a sample: value found, value expected; None if nothing is.

    Args:
        teacher: that section of the identity.
        length: tokens of the sequence, as the record says.
    """
    return next(_wrong(sample, spec, teacher, length), None)


def wrong_digests(shard: ShardReader) -> Iterator[str]:
    """What is wrong with the number of a shard's image digests; nothing if it has none.

    Args:
        shard: opened with its whole record.
    """
    if not shard.has(IMAGE_SHA256):
        return
    images = 1 + max(shard.record.images, default=-1)
    found = shard.layout(IMAGE_SHA256).shape[0]
    if found != images:
        yield f"{found} digests of images, the record says {images} images"


def _wrong(
    sample: CachedSample, spec: CacheSpec, teacher: Mapping[str, Any], length: int
) -> Iterator[str]:
    if odd := _odd_array(sample):
        yield odd
        return
    vocabulary = teacher.get("vocab_size")
    most_id = vocabulary - 1 if isinstance(vocabulary, int) else 2**31 - 1
    yield from _wrong_sequence(sample, most_id)
    vision = 0
    for layer, weights in sample.attention.items():
        vision = weights.shape[-1]
        yield from _wrong_attention(f"attention of layer {layer}", weights, sample, teacher)
    if sample.vision_tokens is not None:
        vision = sample.vision_tokens.shape[0]
        yield from _not_finite("vision tokens", sample.vision_tokens)
        width = teacher.get("hidden_size")
        if sample.vision_tokens.shape[1] != width:
            yield f"vision tokens are {sample.vision_tokens.shape[1]} wide, the teacher {width}"
    if vision and len(sample.input_ids) - 1 + vision != length:
        yield f"{len(sample.input_ids) - 1 + vision} tokens, the record says {length}"
    if sample.vision_start is None and len(sample.input_ids) != length:
        yield f"{len(sample.input_ids)} tokens, the record says {length}"
    if spec.logprobs is not None:
        yield from _wrong_logprobs(sample, most_id)


def _odd_array(sample: CachedSample) -> str | None:
    """An array of other axes or another kind than its meaning asks for."""
    arrays: list[tuple[str, npt.NDArray[Any] | None, int, str]] = [
        ("ids", sample.input_ids, 1, "iu"),
        ("labels", sample.labels, 1, "iu"),
        ("vision tokens", sample.vision_tokens, 2, "f"),
        ("top ids", sample.top_ids, 2, "iu"),
        ("log-probabilities", sample.top_logprobs, 2, "f"),
        ("rest of the log-probabilities", sample.rest_logprobs, 1, "f"),
        *((f"attention of layer {n}", a, 3, "f") for n, a in sample.attention.items()),
    ]
    for name, values, axes, kind in arrays:
        if values is not None and (values.ndim != axes or values.dtype.kind not in kind):
            return f"{name} are {values.dtype} of shape {values.shape}, expected {axes} axes"
    return None


def _wrong_sequence(sample: CachedSample, most_id: int) -> Iterator[str]:
    ids, labels = sample.input_ids, sample.labels
    if len(ids) != len(labels) or not len(ids):
        yield f"{len(ids)} ids and {len(labels)} labels"
        return
    images = np.flatnonzero(ids == IMAGE_TOKEN).tolist()
    expected = [] if sample.vision_start is None else [sample.vision_start]
    if images != expected:
        yield f"image at {images}, expected at {expected}"
    yield from _outside("ids", ids[ids != IMAGE_TOKEN], 0, most_id)
    yield from _outside("labels", labels[labels != IGNORE], 0, most_id)


def _wrong_attention(
    name: str, weights: npt.NDArray[np.float32], sample: CachedSample, teacher: Mapping[str, Any]
) -> Iterator[str]:
    if sample.vision_start is None:
        yield f"{name}, but no image among the ids"
        return
    rows = len(sample.input_ids) - sample.vision_start - 1
    expected = (teacher.get("attention_heads"), rows)
    if weights.shape[:2] != expected:
        yield f"{name} is of heads and rows {weights.shape[:2]}, expected {expected}"
    yield from _not_finite(name, weights)
    yield from _outside(name, weights, 0, _MOST)
    yield from _outside(f"sum of a row in {name}", weights.sum(axis=-1), 0, _MOST)


def _wrong_logprobs(sample: CachedSample, most_id: int) -> Iterator[str]:
    responses = int((sample.labels[1:] != IGNORE).sum())
    ids, kept, rest = sample.top_ids, sample.top_logprobs, sample.rest_logprobs
    if ids is None or kept is None:
        if responses:
            yield f"no log-probabilities, expected {responses} rows"
        return
    if len(ids) != responses or ids.shape != kept.shape:
        yield f"log-probabilities of shape {kept.shape}, expected {responses} rows"
        return
    yield from _outside("top ids", ids, 0, most_id)
    yield from _not_finite("log-probabilities", kept)
    yield from _outside("log-probabilities", kept, -np.inf, _MOST_LOGPROB)
    mass = np.exp(kept.astype(np.float64)).sum(axis=-1)
    if rest is not None:
        if len(rest) != responses:
            yield f"rest of the log-probabilities of shape {rest.shape}, expected {responses} rows"
            return
        yield from _not_finite("rest of the log-probabilities", rest)
        yield from _outside("rest of the log-probabilities", rest, -np.inf, _MOST_LOGPROB)
        mass = mass + np.exp(rest.astype(np.float64))
    yield from _outside("sum of a response's probabilities", mass, 0, _MOST)


def _not_finite(name: str, values: npt.NDArray[Any]) -> Iterator[str]:
    if not np.isfinite(values).all():
        yield f"{name} hold NaN or infinity"


def _outside(
    name: str, values: npt.NDArray[Any], low: float | int, high: float | int
) -> Iterator[str]:
    if values.size and not (values.min() >= low and values.max() <= high):
        yield f"{name} from {values.min()} to {values.max()}, expected {low} to {high}"
