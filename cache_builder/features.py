"""From one tar to the arrays of one shard: read, run the teacher, encode. Nothing is written here.

Every distinct image of the tar goes through the tower once, however many conversations share it.
Samples are run in batches of similar length and encoded one by one, so that a batch's composition
leaves no trace in what is stored.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_builder.teacher import Signals, Teacher
from shared.encodings import ENCODINGS, id_dtype
from shared.errors import UnusableSample
from shared.images import ImageProcessor, decode_image
from shared.mobilevlm import NUM_VISION
from shared.prompt import Prompt, build_prompt
from shared.record import Skipped
from shared.samples import Sample, TarIndex, read_samples
from shared.sequence import SequenceBatch, pad_sequences
from shared.spec import CacheSpec
from shared.store import ShardWriter
from shared.tensor_encodings import encode
from shared.tokenizer import Tokenizer

Parts = dict[str, npt.NDArray[np.generic]]


@dataclass(kw_only=True)
class PreparedSample:
    """A sample that fits: its prompt, and its image while that has not been run."""

    key: str
    "WebDataset key."
    prompt: Prompt
    "Ids and labels."
    image: bytes | None
    "Encoded image."
    image_digest: str | None
    "sha256 of the encoded image."

    @property
    def num_tokens(self) -> int:
        """Length of the expanded sequence."""
        return self.prompt.num_tokens(NUM_VISION)


@dataclass(kw_only=True)
class SampleFeatures:
    """Encoded signals of one sample: array name -> stored parts."""

    attention: dict[str, Parts] = field(default_factory=dict)
    "`attention_<layer>` -> parts, rows first; empty for text only."
    top_ids: npt.NDArray[np.unsignedinteger] | None = None
    "[response positions, k], in the smallest type that holds the vocabulary."
    top_logprobs: Parts = field(default_factory=dict)
    "Encoded [response positions, k]."
    rest_logprobs: npt.NDArray[np.float32] | None = None
    "[response positions]"


@dataclass(kw_only=True)
class ShardFeatures:
    """All that a shard holds, encoded, in the tar's order."""

    samples: list[PreparedSample] = field(default_factory=list)
    "Samples that are stored."
    features: list[SampleFeatures] = field(default_factory=list)
    "Of each sample."
    images: list[int] = field(default_factory=list)
    "Row of each sample in `vision_tokens`; -1 for text only."
    vision_tokens: list[Parts] = field(default_factory=list)
    "Encoded tokens of each distinct image."
    skipped: list[Skipped] = field(default_factory=list)
    "Samples that are not stored."


def prepare(
    tar: TarIndex, spec: CacheSpec, tokenizer: Tokenizer
) -> Iterator[PreparedSample | Skipped]:
    """Read a tar's samples and build their prompts; those that cannot be used come as Skipped."""
    for key, reason in tar.skipped.items():
        yield Skipped(key=key, reason=reason)
    for key, sample in read_samples(tar):
        try:
            yield _prepare(sample, spec, tokenizer)
        except UnusableSample as unusable:
            yield Skipped(key=key, reason=str(unusable))


def compute_features(
    samples: Sequence[PreparedSample],
    teacher: Teacher,
    processor: ImageProcessor,
    spec: CacheSpec,
    *,
    batch_size: int,
    advance: Callable[[int], object],
) -> ShardFeatures:
    """Run the teacher over prepared samples.

    Args:
        batch_size: samples (and images) per forward pass.
        advance: told the number of samples that are done, for the progress bar.
    """
    vision, skipped_images = _run_tower(samples, teacher, processor, batch_size)
    skipped: dict[str, str] = {
        sample.key: skipped_images[sample.image_digest]
        for sample in samples
        if sample.image_digest in skipped_images
    }
    advance(len(skipped))
    usable = [sample for sample in samples if sample.key not in skipped]
    features: dict[str, SampleFeatures] = {}
    for batch in _by_length(usable, batch_size):
        for sample, found in zip(batch, _run_batch(batch, teacher, vision), strict=True):
            try:
                features[sample.key] = _encode(found, spec)
            except UnusableSample as unusable:
                skipped[sample.key] = str(unusable)
        advance(len(batch))
    return _collect(usable, features, vision, skipped, spec)


def write_features(shard: ShardWriter, features: ShardFeatures, spec: CacheSpec) -> None:
    """Put everything of a shard into its arrays (see `cache_specs/format.md`)."""
    prompts = [sample.prompt for sample in features.samples]
    _put_ragged(shard, "input_ids", [p.input_ids for p in prompts], ("token",))
    _put_ragged(shard, "labels", [p.labels for p in prompts], ("token",))
    shard.put("token_offsets", _offsets([len(p.input_ids) for p in prompts]), ("boundary",))
    if spec.vision_tokens is not None:
        axes = ("image", "vision", "channel")
        encoding = spec.vision_tokens.encoding
        _put_parts(shard, "vision_tokens", encoding, features.vision_tokens, axes)
    if spec.attention is not None:
        for layer in spec.attention_layers:
            name = f"attention_{layer}"
            pieces = [f.attention[name] for f in features.features if f.attention]
            _put_parts(shard, name, spec.attention.encoding, pieces, ("query", "head", "vision"))
        rows = [_rows(f.attention) for f in features.features]
        shard.put("query_offsets", _offsets(rows), ("boundary",))
    if spec.logprobs is not None:
        _write_logprobs(shard, features.features, spec.logprobs.encoding)


def _write_logprobs(shard: ShardWriter, features: Sequence[SampleFeatures], encoding: str) -> None:
    ids = [f.top_ids for f in features if f.top_ids is not None]
    rest = [f.rest_logprobs for f in features if f.rest_logprobs is not None]
    _put_ragged(shard, "top_ids", ids, ("response", "top"))
    pieces = [f.top_logprobs for f in features]
    _put_parts(shard, "top_logprobs", encoding, pieces, ("response", "top"))
    if rest:
        _put_ragged(shard, "rest_logprobs", rest, ("response",))
    shard.put("response_offsets", _offsets([len(found) for found in ids]), ("boundary",))


def _prepare(
    sample: Sample | UnusableSample, spec: CacheSpec, tokenizer: Tokenizer
) -> PreparedSample:
    if isinstance(sample, UnusableSample):
        raise sample
    prompt = build_prompt(sample.conversation, spec.template, tokenizer)
    length = prompt.num_tokens(NUM_VISION)
    if length > spec.max_tokens:
        raise UnusableSample(f"{length} tokens, at most {spec.max_tokens}")
    return PreparedSample(
        key=sample.key, prompt=prompt, image=sample.image, image_digest=sample.image_digest
    )


def _run_tower(
    samples: Sequence[PreparedSample], teacher: Teacher, processor: ImageProcessor, batch_size: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Vision tokens by image digest, and digests of images that cannot be used with the reason."""
    distinct = {s.image_digest: s.image for s in samples if s.image is not None and s.image_digest}
    tokens: dict[str, Tensor] = {}
    unusable: dict[str, str] = {}
    digests = list(distinct)
    for start in range(0, len(digests), batch_size):
        pixels: dict[str, npt.NDArray[np.float32]] = {}
        for digest in digests[start : start + batch_size]:
            try:
                pixels[digest] = processor(decode_image(distinct[digest]))
            except UnusableSample as reason:
                unusable[digest] = str(reason)
        if pixels:
            stacked = torch.from_numpy(np.stack(list(pixels.values())))
            tokens |= dict(zip(pixels, teacher.vision_tokens(stacked).cpu(), strict=True))
    for digest, found in tokens.items():
        if not bool(found.isfinite().all()):
            unusable[digest] = "NaN or infinity in the teacher's vision tokens"
    return tokens, unusable


def _by_length(
    samples: Sequence[PreparedSample], batch_size: int
) -> Iterator[list[PreparedSample]]:
    ordered = sorted(samples, key=lambda sample: (sample.num_tokens, sample.key))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


@dataclass(frozen=True, kw_only=True)
class _Raw:
    """One sample's signals in float32, cut out of its batch."""

    attention: dict[int, npt.NDArray[np.float32]]
    top_ids: npt.NDArray[np.unsignedinteger] | None
    top_logprobs: npt.NDArray[np.float32] | None
    rest_logprobs: npt.NDArray[np.float32] | None


def _run_batch(
    batch: Sequence[PreparedSample], teacher: Teacher, vision: dict[str, Tensor]
) -> Iterator[_Raw]:
    sequences = pad_sequences(
        [sample.prompt.input_ids for sample in batch], [sample.prompt.labels for sample in batch]
    )
    of_batch = [vision[sample.image_digest] for sample in batch if sample.image_digest]
    none = torch.zeros(0, NUM_VISION, teacher.config.llama.hidden_size)
    stacked = torch.stack(of_batch) if of_batch else none
    ids = id_dtype(teacher.config.llama.vocab_size)
    yield from _split(teacher.signals(sequences, stacked), sequences, ids)


def _split(signals: Signals, batch: SequenceBatch, ids: type[np.unsignedinteger]) -> Iterator[_Raw]:
    top_ids = None if signals.top_ids is None else signals.top_ids.cpu().numpy().astype(ids)
    attention = {layer: _numpy(values) for layer, values in signals.attention.items()}
    top_logprobs = None if signals.top_logprobs is None else _numpy(signals.top_logprobs)
    rest = None if signals.rest_logprobs is None else _numpy(signals.rest_logprobs)
    image = response = 0
    for row in range(len(batch.lengths)):
        has_image, num_rows = bool(batch.with_image[row]), int(batch.num_text_rows[row])
        stop = response + int(batch.response_mask[row].sum())
        yield _Raw(
            attention={k: v[image, :, :num_rows] for k, v in attention.items()}
            if has_image
            else {},
            top_ids=None if top_ids is None else top_ids[response:stop],
            top_logprobs=None if top_logprobs is None else top_logprobs[response:stop],
            rest_logprobs=None if rest is None else rest[response:stop],
        )
        image, response = image + has_image, stop


def _encode(raw: _Raw, spec: CacheSpec) -> SampleFeatures:
    features = SampleFeatures(top_ids=raw.top_ids)
    if spec.attention is not None:
        for layer, values in raw.attention.items():
            rows_first = values.swapaxes(0, 1)
            features.attention[f"attention_{layer}"] = _encode_signal(
                f"attention of layer {layer}", spec.attention.encoding, rows_first
            )
    if spec.logprobs is not None and raw.top_logprobs is not None:
        name = "log-probabilities"
        features.top_logprobs = _encode_signal(name, spec.logprobs.encoding, raw.top_logprobs)
        if raw.rest_logprobs is not None:
            parts = _encode_signal(name, "float32", raw.rest_logprobs)
            features.rest_logprobs = parts[""].astype(np.float32, copy=False)
    return features


def _encode_signal(name: str, encoding: str, values: npt.NDArray[np.float32]) -> Parts:
    try:
        parts = encode(encoding, torch.from_numpy(values))
    except ValueError as error:
        raise UnusableSample(f"the teacher's {name} {error}") from error
    return {suffix: stored.numpy() for suffix, stored in parts.items()}


def _collect(
    samples: Sequence[PreparedSample],
    features: dict[str, SampleFeatures],
    vision: dict[str, Tensor],
    skipped: dict[str, str],
    spec: CacheSpec,
) -> ShardFeatures:
    shard = ShardFeatures()
    image_rows: dict[str, int] = {}
    for sample in samples:
        digest = sample.image_digest
        if sample.key in skipped:
            continue
        if digest and digest not in image_rows:
            if spec.vision_tokens is not None:
                try:
                    tokens = _numpy(vision[digest])[None]
                    parts = _encode_signal("vision tokens", spec.vision_tokens.encoding, tokens)
                except UnusableSample as reason:
                    skipped[sample.key] = str(reason)
                    continue
                shard.vision_tokens.append(parts)
            image_rows[digest] = len(image_rows)
        shard.samples.append(sample)
        shard.features.append(features[sample.key])
        shard.images.append(image_rows[digest] if digest else -1)
    shard.skipped = [Skipped(key=key, reason=reason) for key, reason in skipped.items()]
    return shard


def _put_ragged(
    shard: ShardWriter, name: str, pieces: Sequence[npt.NDArray[np.generic]], axes: tuple[str, ...]
) -> None:
    if pieces:
        shard.put(name, np.concatenate(pieces), axes)


def _put_parts(
    shard: ShardWriter, name: str, encoding: str, pieces: Sequence[Parts], axes: tuple[str, ...]
) -> None:
    for suffix in pieces[0] if pieces else ():
        joined = np.concatenate([piece[suffix] for piece in pieces])
        stored_axes = ENCODINGS[encoding].axes(suffix, axes)
        level = ENCODINGS[encoding].zstd_level if suffix == "" else 3
        shard.put(name + suffix, joined, stored_axes, zstd_level=level)


def _rows(attention: dict[str, Parts]) -> int:
    return len(next(iter(attention.values()))[""]) if attention else 0


def _offsets(lengths: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _numpy(values: Tensor) -> npt.NDArray[np.float32]:
    return values.float().cpu().numpy()
