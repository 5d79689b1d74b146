"""Targets of the probe's samples, computed again by a teacher and compared with what is stored.

The teacher runs through the build's own code, with a spec that stores the same signals exactly. A
stored value may be off by its encoding's documented bound and by what another batch, library or
device changes in the teacher's arithmetic.

Axes: H head, Q text row, V vision token, C channel, R response position, K top-k entry.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int

from cache_builder.build import Builder
from cache_builder.features import ShardFeatures, compute_features
from cache_builder.prepare import PreparedTar, decode_images, prepare_sample
from cache_builder.setup import load_builder_of
from cache_builder.verify import Problem
from shared.cache import Cache, CachedSample
from shared.checkpoint import ModelFolder
from shared.encodings import ENCODINGS
from shared.errors import CacheError, DamagedError, UnusableSample
from shared.mobilevlm import read_config
from shared.probe import ProbeInput, compare_image, compare_pixels, compare_text, read_probe
from shared.progress import progress
from shared.samples import TarIndex
from shared.spec import CacheSpec
from shared.strict import shown

Values = Float[np.ndarray, "..."]

NOISE = {"float64": 1e-3, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Teacher's dtype -> how far off a value may be, as a share of the largest of its array.
Another batch size alone moves them by up to 6e-6, 3e-3, 3e-2 on a small teacher on a CPU
(`benchmarks/probe.py`). The rest is room for other kernels, TF32 (2^-11 a product) among them, and
for deeper teachers."""


def load_for(cache: Cache, teacher: str, vision_tower: str | None, device: str | None) -> Builder:
    """The cache's teacher, set up to give its signals exactly.

    Raises:
        MismatchError: it is not the teacher that built the cache; both values are named.
        CheckpointError: its folder cannot be used.
    """
    spec = cache.spec.exact()
    if spec.logprobs is not None:  # all of them: which are the largest may change
        vocabulary = read_config(ModelFolder(teacher), vision_tower).llama.vocab_size
        spec = replace(spec, logprobs=replace(spec.logprobs, top_k=vocabulary))
    return load_builder_of(
        cache, teacher, spec,
        "Only the teacher that built a cache can give its targets again: name that one.",
        vision_tower=vision_tower, device=device, batch_size=1,
    )  # fmt: skip


def recompute(cache: Cache, builder: Builder, shards: Sequence[str]) -> tuple[int, list[Problem]]:
    """Compare the probe of these shards with what the teacher gives.

    Returns:
        Number of samples, and what is wrong by shard.
    """
    problems, samples = [], 0
    for name in progress("teacher", "shard", shards):
        try:
            probe = read_probe(cache.root, cache.records[name])
        except DamagedError as error:
            problems.append(Problem(kind="shard", place=name, file="", what=str(error)))
            continue
        for found in probe:
            samples += 1
            for what in _wrong(cache, builder, found):
                what = f"sample {shown(found.key)}: {what}"
                problems.append(Problem(kind="targets", place=name, file="", what=what))
    return samples, problems


def _wrong(cache: Cache, builder: Builder, found: ProbeInput) -> Iterator[str]:
    try:
        inputs = compare_text(found, cache, cache.spec.template, builder.tokenizer)
        inputs |= compare_image(found, cache) | compare_pixels(found, builder.processor)
    except DamagedError as error:
        yield str(error)
        return
    for name, (stored, recomputed) in inputs.items():
        yield f"{name}: {stored} stored, {recomputed} recomputed"
    if inputs:
        return
    try:
        stored_sample = cache.read(found.key)
        tar = prepare_input(found, builder)
    except (CacheError, UnusableSample) as error:
        yield str(error)
        return
    features = compute_features(tar, builder.teacher, builder.spec, advance=lambda _: None)
    if features.skipped:
        yield f"the teacher gives nothing to store: {features.skipped[0].reason}"
        return
    noise = NOISE[builder.teacher.numerics["dtype"]]
    for name, excess in _excesses(stored_sample, features, cache.spec, noise):
        if not excess <= 0:  # NaN too
            yield f"{name} are {excess:.3g} further from the teacher's than their encoding allows"


def prepare_input(found: ProbeInput, builder: Builder) -> PreparedTar:
    """A tar of this one sample, as the build reads one.

    Raises:
        UnusableSample: with the reason.
    """
    sample = prepare_sample(found.sample(), builder.spec, builder.tokenizer)
    images = {} if found.image is None else {str(sample.image_digest): found.image}
    with ThreadPoolExecutor(1) as pool:
        pixels = decode_images(images, builder.processor, pool, pin=False)
    return PreparedTar(
        index=TarIndex(path=Path(f"{found.key}.tar"), samples=(), skipped={}, sha256=""),
        samples=[sample],
        batches=[[sample]],
        pixels=iter([pixels]),
    )


def _excesses(
    stored: CachedSample, features: ShardFeatures, spec: CacheSpec, noise: float
) -> Iterator[tuple[str, float]]:
    """(signal, how far its worst value is beyond what is allowed)."""
    exact = {name: array.values for name, array in features.arrays.items()}
    for layer, attention in stored.attention.items():
        assert spec.attention is not None
        weights = exact[f"attention_{layer}"].swapaxes(0, 1)
        name = f"attention weights of layer {layer}"
        yield name, _excess(spec.attention.encoding, attention, weights, noise)
    if stored.vision_tokens is not None and spec.vision_tokens is not None:
        tokens = exact["vision_tokens"][0]
        excess = _excess(spec.vision_tokens.encoding, stored.vision_tokens, tokens, noise)
        yield "vision tokens", excess
    if spec.logprobs is not None and stored.top_ids is not None:
        assert stored.top_logprobs is not None
        logprobs = _by_id(exact["top_ids"].astype(np.int64), exact["top_logprobs"])
        yield from _logprob_excesses(stored, logprobs, spec.logprobs.encoding, noise)


def _logprob_excesses(
    stored: CachedSample, logprobs: Float32[np.ndarray, "R vocab"], encoding: str, noise: float
) -> Iterator[tuple[str, float]]:
    assert stored.top_ids is not None
    assert stored.top_logprobs is not None
    ids = stored.top_ids.astype(np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < logprobs.shape[1]:
        yield "likeliest tokens", float("inf")
        return
    kept = np.take_along_axis(logprobs, ids, axis=1)
    yield "log-probabilities", _excess(encoding, stored.top_logprobs, kept, noise)
    others = logprobs.copy()
    np.put_along_axis(others, ids, -np.inf, axis=1)
    allowed = noise * float(np.abs(kept).max(initial=0))
    # No token outside is likelier than one inside.
    yield "likeliest tokens", float((others.max(axis=1) - kept.min(axis=1)).max() - allowed)
    if stored.rest_logprobs is not None:
        rest = np.logaddexp.reduce(others.astype(np.float64), axis=1)
        off = np.abs(stored.rest_logprobs - rest)
        yield "rests of the log-probabilities", float((off - noise * np.abs(rest).max()).max())


def _by_id(
    ids: Int[np.ndarray, "R vocab"], values: Float32[np.ndarray, "R vocab"]
) -> Float32[np.ndarray, "R vocab"]:
    """Log-probabilities in the order of the vocabulary."""
    ordered: Float32[np.ndarray, "R vocab"] = np.empty_like(values)
    np.put_along_axis(ordered, ids, values, axis=1)
    return ordered


def _excess(encoding: str, stored: Values, exact: Values, noise: float) -> float:
    """How far the worst stored value is beyond its encoding's bound and the noise; <= 0 is good."""
    if stored.shape != exact.shape:
        return float("inf")
    if not stored.size:
        return 0.0
    slack = noise * float(np.abs(exact).max())
    off = np.abs(stored.astype(np.float64) - exact)
    return float((off - slack - error_bound(encoding, np.abs(exact) + slack, exact)).max())


def error_bound(encoding: str, largest: Values, exact: Values) -> Values:
    """Largest error of each value, as `cache_specs/encodings/` has it.

    Args:
        largest: magnitudes that the values can have had when they were encoded.
        exact: the values.
    """
    form = ENCODINGS[encoding]
    match form.family:
        case "float":
            rounded = np.maximum(largest * 2.0**-11, 2.0**-25)
            bound = rounded if form.bits == 16 else np.zeros_like(exact)
        case "channel":
            span = exact.max(axis=-2, keepdims=True) - exact.min(axis=-2, keepdims=True)
            bound = form.steps_off * (1 + 2.0**-7) * span / form.levels
        case _:
            step = (1 + 2.0**-7) * np.sqrt(largest.max(axis=-1, keepdims=True)) / form.levels
            bound = 2 * form.steps_off * step * np.sqrt(largest) + (form.steps_off * step) ** 2
    return np.asarray(bound)
