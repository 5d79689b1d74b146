"""What can be trained on: samples of the tars, and what a cache has of them, read in any order."""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int32
from torch import Tensor
from torch.utils.data import Dataset

from shared.cache import EncodedBatch, Signal
from shared.errors import MismatchError, TrainingError, UnusableSample
from shared.images import ImageProcessor, decode_image
from shared.mobilevlm import NUM_VISION
from shared.progress import progress
from shared.prompt import IGNORE, IMAGE_TOKEN, Prompt, build_prompt, check_length
from shared.record import Skipped
from shared.samples import (
    SampleEntry,
    TarIndex,
    index_tars,
    read_image,
    read_sample,
    skipped_by_headers,
)
from shared.sequence import SequenceBatch, pad_sequences
from shared.spec import CacheSpec
from shared.strict import shown
from shared.tokenizer import Tokenizer
from student_train.batch import Targets, TrainingBatch
from student_train.config import LossConfig, Recipe
from student_train.entries import Entries

log = logging.getLogger(__name__)


@runtime_checkable  # tests check annotations while running
class TeacherSource(Protocol):
    """Where teacher signals come from: a cache, or (in tests) a live teacher."""

    @property
    def spec(self) -> CacheSpec:
        """What it gives."""
        ...

    def keys(self) -> list[str]:
        """Samples that it knows."""
        ...

    @property
    def lengths(self) -> Int32[np.ndarray, " samples"]:
        """Tokens of each sample's sequence, in the order of `keys`."""
        ...

    def read_batch(self, keys: Sequence[str], signals: Collection[Signal]) -> EncodedBatch:
        """Sequences and the named signals of some samples, as they are stored."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingSet(Dataset[list[int]]):
    """Samples that can be trained on, by number. Indexing with a list of numbers gives a batch."""

    entries: Entries
    "(tar, where in it) of each sample, ordered by key."
    lengths: npt.NDArray[np.int64]
    "Tokens of each sample, vision tokens counted."
    skipped: tuple[Skipped, ...]
    "Samples that cannot be used."
    recipe: Recipe
    "Template, aspect and limit."
    tokenizer: Tokenizer
    "The student's."
    processor: ImageProcessor
    "The student's."
    source: TeacherSource | None
    "Teacher signals, or none."
    tars: Mapping[str, str]
    "Name of each tar and the digest of its index."
    accepted_tars: frozenset[str] = frozenset()
    "Names of tars that may differ from the source's: their images are not compared."

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the order of the samples: a resumed run must find the same."""
        # canonical_digest of {key: length}, without that text in memory: keys are in order.
        digest, before = hashlib.sha256(b"{"), ""
        each = zip(self.entries, self.lengths.tolist(), strict=True)
        for (_, entry), length in progress("identify samples", "sample", each, total=len(self)):
            digest.update(f"{before}{json.dumps(entry.key)}:{length}".encode())
            before = ","
        digest.update(b"}")
        return {"samples": len(self), "sha256": digest.hexdigest()}

    def __getitem__(self, numbers: Sequence[int]) -> TrainingBatch:  # type: ignore[override]
        """The batch of these samples; one with a broken image is left out and listed.

        If none is left, a sequence stands for them of which nothing is learned.
        """
        usable: list[_Input] = []
        skipped: list[Skipped] = []
        chosen = [self.entries[number] for number in numbers]
        stored = self._stored([entry.key for _, entry in chosen])
        cached = _images_of(stored) if stored else [None] * len(chosen)
        for (tar, entry), image in zip(chosen, cached, strict=True):
            try:
                usable.append(self._input(tar, entry, image))
            except UnusableSample as reason:
                skipped.append(Skipped(key=entry.key, reason=str(reason)))
        if skipped:  # their targets go too
            stored = self._stored([found.key for found in usable])
        sequences, targets = _sequences(usable, stored) if usable else (_nothing(), None)
        pixels = [found.pixels for found in usable if found.pixels is not None]
        size = self.processor.size
        return TrainingBatch(
            sequences=sequences,
            pixels=torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros(0, 3, size, size),
            targets=targets,
            skipped=tuple(skipped),
        )

    def _stored(self, keys: Sequence[str]) -> EncodedBatch | None:
        if self.source is None:
            return None
        return self.source.read_batch(keys, used_signals(self.recipe.loss))

    def _input(self, tar: Path, entry: SampleEntry, cached: "_CachedImage | None") -> "_Input":
        """What the tar has of a sample; with a source the text is not needed.

        Args:
            cached: what the source knows of its image.
        """
        if self.source is not None:
            image, prompt = read_image(tar, entry), None
        else:
            sample = read_sample(tar, entry)
            image = sample.image
            prompt = build_prompt(sample.conversation, self.recipe.template, self.tokenizer)
        if cached is not None:
            _refuse_image_or_none(tar, entry.key, image, cached)
            if cached.digest is not None and tar.name not in self.accepted_tars:
                _refuse_other_image(tar, entry.key, image, cached.digest)
        pixels = None if image is None else self.processor(decode_image(image))
        return _Input(key=entry.key, pixels=pixels, prompt=prompt)


@dataclass(frozen=True, kw_only=True)
class _Input:
    """One sample of a batch, as far as the tar has it."""

    key: str
    pixels: npt.NDArray[np.float32] | None
    prompt: Prompt | None


@dataclass(frozen=True, kw_only=True)
class _CachedImage:
    """What a source knows of a sample's image."""

    exists: bool
    "Whether there is one."
    digest: bytes | None
    "sha256 of its file, if the source has that."


def _images_of(stored: EncodedBatch) -> list[_CachedImage]:
    return [
        _CachedImage(exists=bool((ids == IMAGE_TOKEN).any()), digest=digest)
        for ids, digest in zip(stored.input_ids, stored.image_sha256, strict=True)
    ]


def used_signals(loss: LossConfig) -> set[Signal]:
    """What the loss reads; signals of weight 0 are left where they are."""
    used: dict[Signal, bool] = {
        "attention": loss.attention > 0 or (loss.vision > 0 and loss.focus_tokens > 0),
        "vision_tokens": loss.vision > 0,
        "logprobs": loss.kl > 0,
    }
    return {signal for signal, needed in used.items() if needed}


def load_training_set(
    tars: Sequence[Path],
    recipe: Recipe,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    source: TeacherSource | None,
) -> TrainingSet:
    """Index the tars; with a source, take the samples that it knows and their lengths from it.

    Without one, every sample's text is read once to find its length and whether it can be used.

    Raises:
        InputError: tars cannot be read.
        TrainingError: the source knows none of the samples, or none can be used.
    """
    indexes = index_tars(tars)
    skipped = skipped_by_headers(indexes)
    where = {entry.key: (index.path, entry) for index in indexes for entry in index.samples}
    if source is None:
        lengths, more = _measure(indexes, recipe, tokenizer)
    else:
        lengths, more = _fitting(_match(where, source), recipe)
    skipped += more
    if not lengths:
        raise TrainingError(f"no sample in {len(tars)} tars can be used; {_reasons(skipped)}")
    keys = sorted(lengths)
    return TrainingSet(
        entries=Entries(where[key] for key in keys),
        lengths=np.array([lengths[key] for key in keys], dtype=np.int64),
        skipped=tuple(skipped),
        recipe=recipe,
        tokenizer=tokenizer,
        processor=processor,
        source=source,
        tars={index.path.name: index.sha256 for index in indexes},
    )


def _measure(
    indexes: Sequence[TarIndex], recipe: Recipe, tokenizer: Tokenizer
) -> tuple[dict[str, int], list[Skipped]]:
    lengths: dict[str, int] = {}
    skipped: list[Skipped] = []
    everything = [(index.path, entry) for index in indexes for entry in index.samples]
    for tar, entry in progress("read texts", "sample", everything):
        try:
            sample = read_sample(tar, entry)
            prompt = build_prompt(sample.conversation, recipe.template, tokenizer)
            lengths[entry.key] = check_length(prompt.num_tokens(NUM_VISION), recipe.max_tokens)
        except UnusableSample as reason:
            skipped.append(Skipped(key=entry.key, reason=str(reason)))
    return lengths, skipped


def _fitting(lengths: Mapping[str, int], recipe: Recipe) -> tuple[dict[str, int], list[Skipped]]:
    fitting: dict[str, int] = {}
    skipped: list[Skipped] = []
    for key, length in lengths.items():
        try:
            fitting[key] = check_length(length, recipe.max_tokens)
        except UnusableSample as reason:
            skipped.append(Skipped(key=key, reason=str(reason)))
    return fitting, skipped


def _match(where: Mapping[str, object], source: TeacherSource) -> dict[str, int]:
    """Lengths of the samples that are in the tars and in the cache."""
    known = source.keys()
    each = zip(known, source.lengths.tolist(), strict=True)
    lengths = {
        key: length
        for key, length in progress("match samples", "sample", each, total=len(known))
        if key in where
    }
    if known and not lengths:
        raise TrainingError(
            f"none of the cache's {len(known)} samples is in --data (the first: {known[0]!r}); "
            "give the tars that the cache was built from"
        )
    if absent := len(known) - len(lengths):
        log.info("%d of the cache's %d samples are not in --data", absent, len(known))
    if unknown := len(where) - len(lengths):
        log.warning(
            "%d of the %d samples in --data are not in the cache and are left out; cache-tools "
            "info says what it skipped and whether its build is complete", unknown, len(where),
        )  # fmt: skip
    return lengths


_SAME_TARS = (
    "train on the tars that the cache was built from, or build a cache from these (build-cache "
    "into another folder)"
)


def _refuse_image_or_none(tar: Path, key: str, image: bytes | None, cached: _CachedImage) -> None:
    """Pixels too many or too few would be those of its neighbours in the batch."""
    if (image is not None) != cached.exists:
        there, here = ("none", "one") if image is not None else ("one", "none")
        raise MismatchError(
            f"sample {shown(key)}: images: {there} when the cache was built, {here} in {tar}; "
            f"{_SAME_TARS}"
        )


def _refuse_other_image(tar: Path, key: str, image: bytes | None, digest: bytes) -> None:
    """Equal sizes and places of all members, which are compared at the start, do not tell this."""
    found = hashlib.sha256(image or b"").digest()
    if found != digest:
        raise MismatchError(
            f"sample {shown(key)}: its image in {tar} has sha256 {found.hex()}, the one that the "
            f"cache was built from {digest.hex()}; {_SAME_TARS}"
        )


def _reasons(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return "they are empty"
    return "; ".join(f"{sample.key}: {sample.reason}" for sample in skipped[:3])


def _sequences(
    usable: Sequence[_Input], stored: EncodedBatch | None
) -> tuple[SequenceBatch, Targets | None]:
    if stored is not None:
        return pad_sequences(stored.input_ids, stored.labels), _targets(stored)
    prompts = [found.prompt for found in usable if found.prompt is not None]
    return pad_sequences([p.input_ids for p in prompts], [p.labels for p in prompts]), None


def _nothing() -> SequenceBatch:
    """A sequence without a label: it adds nothing to any loss or count."""
    return pad_sequences([np.zeros(1, dtype=np.int32)], [np.full(1, IGNORE, dtype=np.int32)])


def _targets(encoded: EncodedBatch) -> Targets:
    def tensors(parts: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
        return {suffix: torch.from_numpy(stored) for suffix, stored in parts.items()}

    return Targets(
        attention={layer: tensors(parts) for layer, parts in encoded.attention.items()},
        vision_tokens=tensors(encoded.vision_tokens),
        top_ids=None if encoded.top_ids is None else torch.from_numpy(encoded.top_ids),
        top_logprobs=tensors(encoded.top_logprobs),
        rest_logprobs=None
        if encoded.rest_logprobs is None
        else torch.from_numpy(encoded.rest_logprobs),
    )
