"""What a build would do and how large it would be, from the teacher's config and the tars.

No weights are read: `build-cache --dry-run` works with a folder that holds only a config and a
tokenizer. Bytes are before lossless compression, so they are an upper estimate of all but the
metadata, which counts in caches of a few samples.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from cache_builder.committed import Committed
from cache_builder.prepare import PreparedSample, prepare
from cache_builder.probe import choose
from cache_builder.setup import load_teacher_tokenizer
from cache_builder.tars import find_pending
from cache_builder.teacher import check_spec, config_digest, teacher_facts
from shared.checkpoint import ModelFolder
from shared.encodings import ENCODINGS, id_dtype
from shared.images import ImageProcessor
from shared.mobilevlm import NUM_VISION, VLMConfig, read_config
from shared.progress import progress
from shared.record import Skipped, record_names, shard_name
from shared.samples import TarIndex, index_tars
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
    "Samples that were tokenised for the estimate."
    skipped: tuple[Skipped, ...]
    "Of those, the ones that would be skipped."
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
    left = _find_left(indexes, out, spec, config, tokenizer, dtype)
    return _estimate(left, spec, config, tokenizer)


def _find_left(
    tars: Sequence[TarIndex],
    out: Path,
    spec: CacheSpec,
    config: VLMConfig,
    tokenizer: Tokenizer,
    dtype: str | None,
) -> list[TarIndex]:
    """Tars whose shard `out` lacks; what is there must be of this build, as far as that is known
    without reading weights or whole tars.

    Raises:
        MismatchError: `out` holds shards of another spec, teacher, tokenizer or tar.
        DamagedError: a record cannot be read.
        InputError: a tar holds a sample that a shard of another tar holds already.
    """
    if not record_names(out):
        return list(tars)
    identity = {
        "spec": spec.to_dict(),
        "teacher": {**teacher_facts(config), "config_sha256": config_digest(config)},
        "tokenizer": tokenizer_identity(tokenizer),
        "image_processor": ImageProcessor(config.tower_folder, spec.image_aspect).identity,
        **({"numerics": {"dtype": dtype}} if dtype else {}),
    }
    unknown = ("teacher.weights_sha256", "numerics.attention" if dtype else "numerics")
    return find_pending(Committed(out, identity, unknown).records, tars, out, by_headers=True)


def _estimate(
    tars: Sequence[TarIndex], spec: CacheSpec, config: VLMConfig, tokenizer: Tokenizer
) -> Estimate:
    """Sizes by signal, from some 2000 samples spread over the tars, one of each at least."""
    total = sum(len(tar.samples) + len(tar.skipped) for tar in tars)
    share = -(-_MOST_SAMPLES // max(1, len(tars)))
    usable: list[PreparedSample] = []
    skipped: list[Skipped] = []
    images: set[tuple[str, str]] = set()  # each is stored once in every tar that shows it
    for tar in progress("estimate", "tar", tars):
        for item in islice(prepare(tar, spec, tokenizer), share):
            if isinstance(item, Skipped):
                skipped.append(item)
            else:
                item.image = None  # its digest is enough
                usable.append(item)
                if item.image_digest is not None:
                    images.add((tar.name, item.image_digest))
    examined = len(usable) + len(skipped)
    scale = total / max(1, examined)
    return Estimate(
        tars=len(tars),
        samples=total,
        examined=examined,
        skipped=tuple(skipped),
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
