"""What a build would do and how large it would be, from the teacher's config and the tars.

No weights are read: `build-cache --dry-run` works with a folder that holds only a config and a
tokenizer. Bytes are before lossless compression, so they are an upper estimate of all but the
metadata, which counts in caches of a few samples.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cache_builder.committed import Committed
from cache_builder.prepare import PreparedSample, prepare
from cache_builder.probe import choose
from cache_builder.setup import load_teacher_tokenizer
from cache_builder.skips import skipped_before
from cache_builder.tars import find_pending
from cache_builder.teacher import check_spec, config_digest, teacher_facts
from shared.checkpoint import ModelFolder
from shared.encodings import ENCODINGS, id_dtype
from shared.images import ImageProcessor
from shared.mobilevlm import NUM_VISION, VLMConfig, read_config
from shared.progress import progress
from shared.record import ShardRecord, Skipped, record_names, shard_name
from shared.samples import TarIndex, index_tars, skipped_by_headers
from shared.spec import CacheSpec
from shared.tokenizer import Tokenizer, tokenizer_identity

_MOST_SAMPLES = 2000
"Samples that are tokenised for the estimate, or one per tar; totals are scaled from them."


@dataclass(frozen=True, kw_only=True)
class SignalSize:
    """One signal's part of the cache."""

    signal: str
    "Which; the probe and the images' digests are counted like one."
    unit: str
    "What it is stored per."
    unit_bytes: float
    "Bytes per unit, before compression."
    units: float
    "Units in the whole cache, estimated."

    @property
    def size(self) -> float:
        """Bytes, before compression."""
        return self.unit_bytes * self.units


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a build would do."""

    tars: int
    "Tars whose shard is still to be built."
    samples: int
    "Samples in them."
    examined: int
    "Samples of which it was found out whether they can be used."
    skipped: tuple[Skipped, ...]
    "Of those, the ones that would be skipped; all that the tars' headers tell are among them."
    all_samples: int
    "Samples of all tars, also of those whose shard is there."
    all_skipped: int
    "Of these, how many were or would be skipped, estimated."
    signals: tuple[SignalSize, ...]
    "Parts of the cache."

    @property
    def size(self) -> float:
        """Bytes of the whole cache, before compression."""
        return sum(signal.size for signal in self.signals)


def estimate(
    spec: CacheSpec,
    teacher: str,
    vision_tower: str | None,
    tars: Sequence[Path],
    out: Path,
    dtype: str | None,
) -> Estimate:
    """What `build-cache` would do with the same arguments.

    Args:
        dtype: the teacher's number format; None where the device is to decide.

    Raises:
        CheckpointError: the teacher's config or tokenizer cannot be used.
        ConfigError: the spec asks for what the teacher does not have.
        InputError: a tar cannot be read, or no shard may be called like it.
        CacheError: `out` holds shards of something else, or a damaged record.
    """
    folder = ModelFolder(teacher)
    config = read_config(folder, vision_tower)
    check_spec(spec, config)
    for tar in tars:
        shard_name(tar)
    indexes = index_tars(tars)
    tokenizer = load_teacher_tokenizer(folder, config)
    records = _records(out, spec, config, tokenizer, dtype)
    left = find_pending(records, indexes, out, by_headers=True)
    found = _estimate(left, spec, config, tokenizer)
    return replace(
        found,
        all_samples=sum(index.num_samples for index in indexes),
        all_skipped=found.all_skipped + len(skipped_before(indexes, records)),
    )


def _records(
    out: Path, spec: CacheSpec, config: VLMConfig, tokenizer: Tokenizer, dtype: str | None
) -> Mapping[str, ShardRecord]:
    """Of the shards in `out`, which must be of this build, as far as that is known without reading
    weights.

    Raises:
        MismatchError: `out` holds shards of another spec, teacher or tokenizer.
        DamagedError: a record cannot be read.
    """
    if not record_names(out):
        return {}
    identity = {
        "spec": spec.to_dict(),
        "teacher": {**teacher_facts(config), "config_sha256": config_digest(config)},
        "tokenizer": tokenizer_identity(tokenizer),
        "image_processor": ImageProcessor(config.tower_folder, spec.image_aspect).identity,
        **({"numerics": {"dtype": dtype}} if dtype else {}),
    }
    unknown = ("teacher.weights_sha256", "numerics.attention" if dtype else "numerics")
    return Committed(out, identity, unknown).records


def _estimate(
    tars: Sequence[TarIndex], spec: CacheSpec, config: VLMConfig, tokenizer: Tokenizer
) -> Estimate:
    """Sizes by signal, from some 2000 samples out of all tars, one of each at least."""
    share = -(-_MOST_SAMPLES // max(1, len(tars)))
    usable: list[PreparedSample] = []
    skipped: list[Skipped] = []
    images: set[tuple[str, str]] = set()  # each is stored once in every tar that shows it
    for tar in progress("estimate", "tar", tars):
        # Neighbours, not spread over the tar: they show one image, as often as all do.
        some = replace(tar, samples=tar.samples[:share], skipped={})
        for item in prepare(some, spec, tokenizer):
            if isinstance(item, Skipped):
                skipped.append(item)
            else:
                item.image = None  # its digest is enough
                usable.append(item)
                if item.image_digest is not None:
                    images.add((tar.name, item.image_digest))
    scale = sum(len(tar.samples) for tar in tars) / max(1, len(usable) + len(skipped))
    # Those that the headers rule out are all known: no part of them stands for the others.
    lost = skipped_by_headers(tars)
    total = sum(tar.num_samples for tar in tars)
    all_skipped = len(lost) + round(len(skipped) * scale)
    skipped += lost
    return Estimate(
        tars=len(tars),
        samples=total,
        examined=len(usable) + len(skipped),
        skipped=tuple(skipped),
        all_samples=total,
        all_skipped=all_skipped,
        signals=(
            *_signals(usable, len(images), spec, config, scale),
            _probe(tars, {s.key for s in skipped}),
        ),
    )


def _probe(tars: Sequence[TarIndex], skipped: Collection[str]) -> SignalSize:
    """Inputs that each shard stores of a few samples, by the sizes in the tars' headers."""
    chosen = [s for tar in tars for s in choose(s for s in tar.samples if s.key not in skipped)]
    size = sum(s.annotation.size + (s.image.size if s.image else 0) for s in chosen)
    return SignalSize(
        signal="probe", unit="tar", unit_bytes=size / max(1, len(tars)), units=float(len(tars))
    )


def _signals(
    samples: Sequence[PreparedSample],
    images: int,
    spec: CacheSpec,
    config: VLMConfig,
    scale: float,
) -> list[SignalSize]:
    """`images`: distinct ones of each tar, added up."""
    text_rows = sum(s.num_text_rows for s in samples)
    responses = sum(s.num_responses for s in samples)
    tokens = sum(len(s.prompt.input_ids) for s in samples)
    llama = config.llama
    signals = [
        SignalSize(signal="sequence", unit="token", unit_bytes=8.0, units=tokens * scale),
        SignalSize(signal="image digests", unit="image", unit_bytes=32.0, units=images * scale),
    ]
    if spec.attention is not None:
        encoding = ENCODINGS[spec.attention.encoding]
        layers = len(spec.attention.layers)
        row = layers * encoding.size((llama.num_attention_heads, NUM_VISION))
        signals.append(
            SignalSize(signal="attention", unit="text row", unit_bytes=row, units=text_rows * scale)
        )
    if spec.vision_tokens is not None:
        encoding = ENCODINGS[spec.vision_tokens.encoding]
        image = encoding.size((NUM_VISION, llama.hidden_size))
        signals.append(
            SignalSize(signal="vision tokens", unit="image", unit_bytes=image, units=images * scale)
        )
    if spec.logprobs is not None:
        ids = spec.logprobs.top_k * np.dtype(id_dtype(llama.vocab_size)).itemsize
        values = ENCODINGS[spec.logprobs.encoding].size((spec.logprobs.top_k,))
        position = ids + values + 4  # and the rest's mass, float32
        signals.append(
            SignalSize(
                signal="log-probabilities",
                unit="response position",
                unit_bytes=position,
                units=responses * scale,
            )
        )
    return signals
