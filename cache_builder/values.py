"""What a cached sample's values have to be like, whatever the teacher."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32

from shared.cache import CachedSample
from shared.expected import IMAGE_SHA256
from shared.reader import ShardReader

_MOST = 1.1
"A probability and a sum of some, with room for the coarsest encodings' rounding."
_MOST_LOGPROB = 0.01
"The same for a logarithm, in nats."


def wrong_value(sample: CachedSample) -> str | None:
    """What is wrong with a sample: value found, value expected; None if nothing is.

    Shapes, ids and numbers of rows are not asked about: nothing is read where those are wrong.
    """
    return next(_wrong(sample), None)


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


def _wrong(sample: CachedSample) -> Iterator[str]:
    for layer, weights in sample.attention.items():
        name = f"attention of layer {layer}"
        yield from _not_finite(name, weights)
        yield from _outside(name, weights, 0, _MOST)
        yield from _outside(f"sum of a row in {name}", weights.sum(axis=-1), 0, _MOST)
    if sample.vision_tokens is not None:
        yield from _not_finite("vision tokens", sample.vision_tokens)
    if sample.top_logprobs is not None:
        yield from _wrong_logprobs(sample.top_logprobs, sample.rest_logprobs)


def _wrong_logprobs(
    kept: Float32[np.ndarray, "R K"], rest: Float32[np.ndarray, " R"] | None
) -> Iterator[str]:
    yield from _not_finite("log-probabilities", kept)
    yield from _outside("log-probabilities", kept, -np.inf, _MOST_LOGPROB)
    mass = np.exp(kept.astype(np.float64)).sum(axis=-1)
    if rest is not None:
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
