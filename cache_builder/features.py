"""From one prepared tar to the arrays of one shard: run the teacher, encode. Nothing is written.

Every distinct image of the tar goes through the tower once, however many conversations share it.
Samples run in batches of similar length. What comes out is encoded on the teacher's device, every
row on its own, so that a batch's composition leaves no trace in what is stored; only encoded rows
are kept until the tar is done.

Axes: N image, H head, Q text row, V vision token, C channel, R response position, K top-k entry.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cache_builder.arrays import Axes, ShardArray, ShardArrays
from cache_builder.prepare import PixelBatch, PreparedSample, PreparedTar
from cache_builder.teacher import Signals, Teacher
from shared.encodings import ENCODINGS, id_dtype
from shared.expected import IMAGE_SHA256
from shared.record import Skipped
from shared.sequence import pad_sequences
from shared.spec import CacheSpec
from shared.store import ShardWriter
from shared.tensor_encodings import encode


@dataclass(kw_only=True)
class ShardFeatures:
    """All that a shard holds, encoded, in the tar's order."""

    samples: list[PreparedSample]
    "Samples that are stored."
    images: list[int]
    "Row of each sample in `vision_tokens`; -1 for text only."
    image_digests: list[str]
    "sha256 of each distinct image's file, in the order of those rows."
    arrays: dict[str, ShardArray]
    "The teacher's signals by array name, siblings included."
    skipped: list[Skipped]
    "Samples of the tar that are not stored."


def compute_features(
    tar: PreparedTar, teacher: Teacher, spec: CacheSpec, *, advance: Callable[[int], object]
) -> ShardFeatures:
    """Run the teacher over a prepared tar.

    Args:
        advance: told the number of samples that are done, for the progress bar.
    """
    advance(len(tar.skipped))
    run = _TarRun(tar=tar, teacher=teacher, spec=spec)
    for batch in tar.batches:
        run.batch(batch)
        advance(len(batch))
    return run.finish()


def write_features(shard: ShardWriter, features: ShardFeatures, spec: CacheSpec) -> None:
    """Put everything of a shard into its arrays (see `cache_specs/format.md`)."""
    prompts = [sample.prompt for sample in features.samples]
    if prompts:
        shard.put("input_ids", np.concatenate([p.input_ids for p in prompts]), ("token",))
        shard.put("labels", np.concatenate([p.labels for p in prompts]), ("token",))
    shard.put_offsets("token_offsets", [len(p.input_ids) for p in prompts])
    if features.image_digests:
        digests = np.frombuffer(bytes.fromhex("".join(features.image_digests)), dtype=np.uint8)
        shard.put(IMAGE_SHA256, digests.reshape(-1, 32), ("image", "byte"))
    for name, array in features.arrays.items():
        shard.put(name, array.values, array.axes, zstd_level=array.zstd_level)
    if spec.attention is not None:
        shard.put_offsets("query_offsets", [sample.num_text_rows for sample in features.samples])
    if spec.logprobs is not None:
        num_responses = [sample.num_responses for sample in features.samples]
        shard.put_offsets("response_offsets", num_responses)


@dataclass(kw_only=True)
class _TarRun:
    """One tar on its way through the teacher."""

    tar: PreparedTar
    teacher: Teacher
    spec: CacheSpec
    arrays: ShardArrays = field(init=False)
    uses: Counter[str] = field(init=False)
    "Samples that are still to run, by image digest."
    vision: dict[str, Tensor] = field(default_factory=dict)
    """Vision tokens, unencoded, of the images that such samples show; in host memory between the
    batches that show them."""
    unusable: dict[str, str] = field(default_factory=dict)
    "Digests of images that cannot be used -> the reason."
    skipped: dict[str, str] = field(default_factory=dict)
    "Keys of samples that cannot be used -> the reason."

    def __post_init__(self) -> None:
        samples = self.tar.samples
        self.uses = Counter(_digests(samples))
        self.arrays = ShardArrays(
            {
                "image": dict.fromkeys(self.uses, 1),
                "query": {sample.key: sample.num_text_rows for sample in samples},
                "response": {sample.key: sample.num_responses for sample in samples},
            }
        )

    def batch(self, samples: Sequence[PreparedSample]) -> None:
        """Run one batch, after the tower has run on the images that it still lacks."""
        digests = _digests(samples)
        while not self.vision.keys() | self.unusable.keys() >= set(digests):
            self._run_tower(next(self.tar.pixels))
        self._skip({s.key: self.unusable.get(s.image_digest or "") for s in samples})
        usable = [sample for sample in samples if sample.key not in self.skipped]
        if usable and (self.spec.logprobs or (self.spec.attention and _digests(usable))):
            self._run_decoder(usable)
        self.uses.subtract(digests)
        for digest in set(digests) & self.vision.keys():
            tokens = self.vision.pop(digest)
            if self.uses[digest]:
                # A tar's images can be more than fit a device, its encoded rows lie here anyway.
                self.vision[digest] = tokens.cpu()

    def finish(self) -> ShardFeatures:
        """What of the tar is stored."""
        samples = [sample for sample in self.tar.samples if sample.key not in self.skipped]
        late = [sample.key for sample in self.tar.samples if sample.key in self.skipped]
        kept = set(_digests(samples))
        # In the order of the arrays: a lost sample may have been the first to show an image.
        rows = {image: row for row, image in enumerate(i for i in self.uses if i in kept)}
        keys = {sample.key for sample in samples}
        return ShardFeatures(
            samples=samples,
            image_digests=list(rows),
            images=[rows[s.image_digest] if s.image_digest else -1 for s in samples],
            arrays=self.arrays.take({"image": rows, "query": keys, "response": keys}),
            skipped=self.tar.skipped + [Skipped(key=k, reason=self.skipped[k]) for k in late],
        )

    def _run_tower(self, batch: PixelBatch) -> None:
        self.unusable |= batch.unusable
        if not batch.digests:
            return
        tokens_NVC = self.teacher.vision_tokens(batch.pixels)
        found = dict(zip(batch.digests, tokens_NVC, strict=True))
        finite = tokens_NVC.flatten(1).isfinite().all(dim=1).tolist()
        self.unusable |= {
            digest: "NaN or infinity in the teacher's vision tokens"
            for digest, good in zip(found, finite, strict=True)
            if not good
        }
        good = [digest for digest in found if digest not in self.unusable]
        if self.spec.vision_tokens is not None and good:
            self.unusable |= self._store(
                "vision tokens", "vision_tokens", ("image", "vision", "channel"),
                self.spec.vision_tokens.encoding, dict.fromkeys(good, 1),
                tokens_NVC if all(finite) else torch.stack([found[digest] for digest in good]),
            )  # fmt: skip
        # Copies: a view that a later conversation needs would keep its whole batch.
        self.vision |= {d: found[d].clone() for d in good}

    def _run_decoder(self, samples: Sequence[PreparedSample]) -> None:
        sequences = pad_sequences(
            [sample.prompt.input_ids for sample in samples],
            [sample.prompt.labels for sample in samples],
        )
        vision = [self.vision[digest] for digest in _digests(samples)]
        signals = self.teacher.signals(sequences, vision)
        self._store_attention(signals, samples)
        self._store_logprobs(signals, samples)

    def _store_attention(self, signals: Signals, samples: Sequence[PreparedSample]) -> None:
        rows = {s.key: s.num_text_rows for s in samples if s.image_digest is not None}
        for layer, values in signals.attention.items():
            assert self.spec.attention is not None
            refused = self._store(
                f"attention of layer {layer}", f"attention_{layer}", ("query", "head", "vision"),
                self.spec.attention.encoding, rows, values,
            )  # fmt: skip
            self._skip(refused)

    def _store_logprobs(self, signals: Signals, samples: Sequence[PreparedSample]) -> None:
        if self.spec.logprobs is None or signals.top_ids is None or signals.top_logprobs is None:
            return
        rows = {sample.key: sample.num_responses for sample in samples}
        ids = signals.top_ids.to(getattr(torch, id_dtype(self.teacher.vocabulary).__name__))
        self.arrays.put("top_ids", ("response", "top"), list(rows), ids)
        self._skip(
            self._store(
                "log-probabilities", "top_logprobs", ("response", "top"),
                self.spec.logprobs.encoding, rows, signals.top_logprobs,
            )
        )  # fmt: skip
        if signals.rest_logprobs is not None:
            self._skip(
                self._store(
                    "log-probabilities", "rest_logprobs", ("response",), "float32", rows,
                    signals.rest_logprobs,
                )
            )  # fmt: skip

    def _store(
        self,
        signal: str,
        name: str,
        axes: Axes,
        encoding: str,
        num_rows: Mapping[str, int],
        values: Tensor,
    ) -> dict[str, str]:
        """Encode the rows of several owners and put them into an array; owners refused, and why."""
        refused: dict[str, str] = {}
        try:
            parts = encode(encoding, values)
        except ValueError:
            split = torch.split(values, list(num_rows.values()))
            pieces = dict(zip(num_rows, split, strict=True))
            refused = _refused(encoding, pieces)
            pieces = {owner: piece for owner, piece in pieces.items() if owner not in refused}
            parts = encode(encoding, torch.cat(list(pieces.values()))) if pieces else {}
        owners = [owner for owner in num_rows if owner not in refused]
        form = ENCODINGS[encoding]
        for suffix, rows in parts.items():
            stored_axes = form.axes(suffix, axes)
            self.arrays.put(name + suffix, stored_axes, owners, rows, zstd_level=form.zstd_level)
        return {owner: f"the teacher's {signal} {why}" for owner, why in refused.items()}

    def _skip(self, reasons: Mapping[str, str | None]) -> None:
        for key, reason in reasons.items():
            if reason is not None:
                self.skipped.setdefault(key, reason)


def _refused(encoding: str, pieces: Mapping[str, Tensor]) -> dict[str, str]:
    refused = {}
    for owner, piece in pieces.items():
        try:
            encode(encoding, piece)
        except ValueError as error:
            refused[owner] = str(error)
    return refused


def _digests(samples: Iterable[PreparedSample]) -> list[str]:
    """Image digests of the samples that have an image."""
    return [sample.image_digest for sample in samples if sample.image_digest is not None]
