"""A cache of given signals, written by the project's own writer, without a teacher."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.signals import CHANNELS, HEADS, RESPONSES, ROWS, VOCABULARY, Signals
from shared.encodings import ENCODINGS, id_dtype
from shared.expected import IMAGE_SHA256
from shared.record import FORMAT, TarFacts
from shared.spec import CacheSpec
from shared.store import ShardWriter, new_shard
from shared.tensor_encodings import encode

_BEFORE = 35
_DIGEST = "0" * 64
SEQUENCE = [1, *range(3, _BEFORE + 2), -200, *range(100, 100 + ROWS)]
"Ids of every sample: text, the image, 128 text rows."


def write_cache(
    out: Path, spec: CacheSpec, signals: Sequence[Signals], *, samples: int, shards: int
) -> None:
    """`samples` samples, going round `signals`, in equal shards."""
    each = samples // shards
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        with new_shard(
            out, f"t-{shard:06d}", format=FORMAT, identity=identity(spec),
            tar=TarFacts(name=f"t-{shard:06d}.tar", size=0, sha256=_DIGEST, index_sha256=_DIGEST),
            keys=tuple(f"sample-{number:08d}" for number in numbers),
            lengths=(len(SEQUENCE) + 143,) * each, images=tuple(range(each)), skipped=(),
            probe=(),
        ) as writer:  # fmt: skip
            _write(writer, spec, [signals[number % len(signals)] for number in numbers])


def identity(spec: CacheSpec) -> dict[str, object]:
    """An identity that can be read, of a teacher that does not exist."""
    return {
        "spec": spec.to_dict(),
        "teacher": {
            "hidden_size": CHANNELS, "attention_heads": HEADS, "vocab_size": VOCABULARY,
            "vision_tokens": 144, "weights_sha256": _DIGEST, "config_sha256": _DIGEST,
        },
        "tokenizer": {"vocab_size": VOCABULARY, "vocab_sha256": _DIGEST},
        "image_processor": {"class": "none"},
        "numerics": {"dtype": "float32"},
    }  # fmt: skip


def _write(writer: ShardWriter, spec: CacheSpec, samples: Sequence[Signals]) -> None:
    ids = np.array(SEQUENCE * len(samples), dtype=np.int32)
    writer.put("input_ids", ids, ("token",))
    writer.put(
        "labels", np.where(ids >= 100 + ROWS - RESPONSES, ids, -100).astype(np.int32), ("token",)
    )
    _put_offsets(writer, "token_offsets", len(SEQUENCE), len(samples))
    digests = np.random.default_rng(0).integers(0, 256, (len(samples), 32), dtype=np.uint8)
    writer.put(IMAGE_SHA256, digests, ("image", "byte"))
    if spec.attention is not None:
        axes = ("query", "head", "vision")
        _put(writer, "attention_0", axes, spec.attention.encoding, [s.attention for s in samples])
        _put_offsets(writer, "query_offsets", ROWS, len(samples))
    if spec.vision_tokens is not None:
        axes = ("image", "vision", "channel")
        values = [s.vision_tokens[None] for s in samples]
        _put(writer, "vision_tokens", axes, spec.vision_tokens.encoding, values)
    if spec.logprobs is not None:
        top_ids = torch.cat([s.top_ids for s in samples]).numpy().astype(id_dtype(VOCABULARY))
        writer.put("top_ids", top_ids, ("response", "top"))
        top = [s.top_logprobs for s in samples]
        _put(writer, "top_logprobs", ("response", "top"), spec.logprobs.encoding, top)
        _put(writer, "rest_logprobs", ("response",), "float32", [s.rest_logprobs for s in samples])
        _put_offsets(writer, "response_offsets", len(samples[0].top_ids), len(samples))


def _put(
    writer: ShardWriter, name: str, axes: tuple[str, ...], encoding: str, values: list[Tensor]
) -> None:
    pieces = [encode(encoding, value) for value in values]
    for suffix in pieces[0]:
        writer.put(
            name + suffix,
            torch.cat([piece[suffix] for piece in pieces]).numpy(),
            ENCODINGS[encoding].axes(suffix, axes),
            zstd_level=ENCODINGS[encoding].zstd_level,
        )


def _put_offsets(writer: ShardWriter, name: str, each: int, samples: int) -> None:
    writer.put(name, np.arange(samples + 1, dtype=np.int64) * each, ("boundary",))
