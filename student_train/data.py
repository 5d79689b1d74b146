"""Training data: what is in the tars and the cache, planned into batches, read in any order.

Batches are planned from an index (key, length, image or not), so any shuffle, seed, world size and
length grouping works on one cache, and a resumed run goes on with the very next sample.
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int, Int32, Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from shared.cache import EncodedBatch, Signal
from shared.errors import MismatchError, ProjectError, TrainingError, UnusableSample
from shared.images import ImageProcessor, decode_image
from shared.mobilevlm import NUM_VISION
from shared.prompt import Prompt, build_prompt
from shared.record import Skipped
from shared.samples import SampleEntry, TarIndex, index_tars, read_image, read_sample
from shared.sequence import SequenceBatch, pad_sequences
from shared.spec import CacheSpec, canonical_digest
from shared.strict import shown
from shared.tokenizer import Tokenizer
from student_train.config import LossConfig, Recipe

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
class Targets:
    """Teacher signals of one batch as they are stored: decoded where the student is.

    Stored arrays come by suffix, as `shared.tensor_encodings.decode` takes them. A signal that is
    not used is empty or None.
    """

    attention: dict[int, dict[str, Shaped[Tensor, "N Q teacher_head ..."]]]
    "Teacher layer -> A_tv of the samples with an image; padded rows decode to zero."
    vision_tokens: dict[str, Shaped[Tensor, "N ..."]]
    "Projected vision tokens of the samples with an image."
    top_ids: Shaped[Tensor, "R K"] | None
    "Likeliest tokens at the batch's response positions, sample by sample."
    top_logprobs: dict[str, Shaped[Tensor, "R ..."]]
    "Their log-probabilities in nats."
    rest_logprobs: Float[Tensor, " R"] | None
    "Log of the mass outside the top k; None if k is the vocabulary."


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """One micro-batch."""

    sequences: SequenceBatch
    "Ids, labels, vision spans."
    pixels: Float[Tensor, "N 3 S S"]
    "Images of the samples that have one, in batch order."
    targets: Targets | None
    "Teacher signals; None in plain supervised training."
    skipped: tuple[Skipped, ...]
    "Samples that were to be in the batch but have a broken image."

    @property
    def row_mask(self) -> Bool[Tensor, "N Q"]:
        """True for real text rows of the samples with an image."""
        rows = self.sequences.num_text_rows[self.sequences.with_image]
        longest = int(rows.max()) if len(rows) else 0
        return torch.arange(longest, device=rows.device) < rows[:, None]

    def to(self, device: torch.device) -> "TrainingBatch":
        """The same batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "TrainingBatch":
        """The same batch in memory that a GPU fetches while the CPU goes on; DataLoader asks."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TrainingBatch":
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, Mapping):
                return {key: changed(item) for key, item in value.items()}
            if isinstance(value, SequenceBatch | Targets):
                return replace(
                    value, **{f.name: changed(getattr(value, f.name)) for f in fields(value)}
                )
            return value

        return replace(
            self,
            sequences=changed(self.sequences),
            pixels=change(self.pixels),
            targets=changed(self.targets),
        )


@dataclass(frozen=True, kw_only=True)
class TrainingSet(Dataset[list[int]]):
    """Samples that can be trained on, by number. Indexing with a list of numbers gives a batch."""

    entries: tuple[tuple[Path, SampleEntry], ...]
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
        lengths = {
            entry.key: int(length)
            for (_, entry), length in zip(self.entries, self.lengths, strict=True)
        }
        return {"samples": len(lengths), "sha256": canonical_digest(lengths)}

    def __getitem__(self, numbers: Sequence[int]) -> TrainingBatch:  # type: ignore[override]
        """The batch of these samples; one with a broken image is left out and listed."""
        usable: list[_Input] = []
        skipped: list[Skipped] = []
        chosen = [self.entries[number] for number in numbers]
        stored = self._stored([entry.key for _, entry in chosen])
        digests = stored.image_sha256 if stored else [None] * len(chosen)
        for (tar, entry), digest in zip(chosen, digests, strict=True):
            try:
                usable.append(self._input(tar, entry, digest))
            except UnusableSample as reason:
                skipped.append(Skipped(key=entry.key, reason=str(reason)))
        if not usable:
            raise TrainingError(
                f"no sample of a batch can be used: {skipped[0].key}: {skipped[0].reason}"
            )
        if skipped:  # their targets go too
            stored = self._stored([found.key for found in usable])
        sequences, targets = _sequences(usable, stored)
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

    def _input(self, tar: Path, entry: SampleEntry, digest: bytes | None) -> "_Input":
        """What the tar has of a sample; with a source the text is not needed.

        Args:
            digest: sha256 that the source has of the image, if it has one.
        """
        if self.source is not None:
            image, prompt = read_image(tar, entry), None
        else:
            sample = read_sample(tar, entry)
            image = sample.image
            prompt = build_prompt(sample.conversation, self.recipe.template, self.tokenizer)
        if digest is not None and tar.name not in self.accepted_tars:
            _refuse_other_image(tar, entry.key, image, digest)
        pixels = None if image is None else self.processor(decode_image(image))
        return _Input(key=entry.key, pixels=pixels, prompt=prompt)


@dataclass(frozen=True, kw_only=True)
class _Input:
    """One sample of a batch, as far as the tar has it."""

    key: str
    pixels: npt.NDArray[np.float32] | None
    prompt: Prompt | None


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
        InputError: a tar cannot be read.
        TrainingError: the source knows none of the samples, or none can be used.
    """
    indexes, broken = index_tars(tars)
    if broken:
        raise broken[0]
    skipped = [Skipped(key=key, reason=why) for i in indexes for key, why in i.skipped.items()]
    where = {entry.key: (index.path, entry) for index in indexes for entry in index.samples}
    if source is None:
        lengths, more = _measure(indexes, recipe, tokenizer)
        skipped += more
    else:
        lengths = _match(where, source)
        too_long = [key for key, length in lengths.items() if length > recipe.max_tokens]
        skipped += [
            Skipped(key=key, reason=_over_limit(lengths.pop(key), recipe)) for key in too_long
        ]
    if not lengths:
        raise TrainingError(f"no sample in {len(tars)} tars can be used; {_reasons(skipped)}")
    keys = sorted(lengths)
    return TrainingSet(
        entries=tuple(where[key] for key in keys),
        lengths=np.array([lengths[key] for key in keys], dtype=np.int64),
        skipped=tuple(skipped),
        recipe=recipe,
        tokenizer=tokenizer,
        processor=processor,
        source=source,
        tars={index.path.name: index.sha256 for index in indexes},
    )


def plan_epoch(
    lengths: Int[np.ndarray, " samples"], recipe: Recipe, epoch: int
) -> Int[np.ndarray, "steps global_batch"]:
    """Sample numbers of each global batch of one epoch; a function of its arguments alone.

    A last batch that is not full is left out; another epoch leaves out other samples.
    """
    random = np.random.default_rng((recipe.seed, epoch))
    order = random.permutation(len(lengths))
    steps = len(lengths) // recipe.global_batch
    order = order[: steps * recipe.global_batch]
    if recipe.group_by_length:
        pool = 50 * recipe.global_batch  # sorted within pools, so that batches stay random
        order = np.concatenate(
            [
                part[np.argsort(-lengths[part], kind="stable")]
                for part in np.split(order, range(pool, len(order), pool))
            ]
        )
        return random.permutation(order.reshape(steps, recipe.global_batch))
    return order.reshape(steps, recipe.global_batch)


def micro_batches(
    training_set: TrainingSet, *, first_step: int, last_step: int, rank: int, world: int
) -> Iterator[list[TrainingBatch]]:
    """This process's micro-batches, step by step, from `first_step` on.

    Worker processes are started by the call, not by the first step: what is forked then has no
    threads of logs and progress bars yet, whose locks a child would inherit as they are.
    """
    recipe = training_set.recipe
    each = recipe.global_batch // recipe.micro_batch // world

    def plan() -> Iterator[list[int]]:
        per_epoch = len(training_set) // recipe.global_batch
        epoch, batches = -1, np.empty((0, 0), dtype=np.int64)
        for step in range(first_step, last_step):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                batches = plan_epoch(training_set.lengths, recipe, epoch)
            mine = batches[step % per_epoch][rank::world]
            for part in mine.reshape(each, recipe.micro_batch):
                yield part.tolist()

    # batch_size None: the set makes whole batches itself.
    loader: DataLoader[TrainingBatch | ProjectError] = DataLoader(
        _ErrorsAsValues(training_set),  # type: ignore[arg-type]
        sampler=plan(),  # gone through once
        batch_size=None,
        num_workers=recipe.workers,
        prefetch_factor=4 if recipe.workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return _steps(iter(loader), each)


def _steps(
    batches: Iterator[TrainingBatch | ProjectError], each: int
) -> Iterator[list[TrainingBatch]]:
    step: list[TrainingBatch] = []
    for batch in batches:
        if isinstance(batch, ProjectError):
            raise batch
        step.append(batch)
        if len(step) == each:
            yield step
            step = []


@dataclass(frozen=True)
class _ErrorsAsValues(Dataset[list[int]]):
    """Hands our own errors over as values: raised in a worker process, one would come out with the
    worker's traceback for its message.
    """

    batches: TrainingSet

    def __getitem__(  # type: ignore[override]
        self, numbers: Sequence[int]
    ) -> TrainingBatch | ProjectError:
        try:
            return self.batches[numbers]
        except ProjectError as error:
            return error


def _measure(
    indexes: Sequence[TarIndex], recipe: Recipe, tokenizer: Tokenizer
) -> tuple[dict[str, int], list[Skipped]]:
    lengths: dict[str, int] = {}
    skipped: list[Skipped] = []
    everything = [(index.path, entry) for index in indexes for entry in index.samples]
    for tar, entry in tqdm(everything, unit="sample", desc="read texts", delay=2):
        try:
            sample = read_sample(tar, entry)
            prompt = build_prompt(sample.conversation, recipe.template, tokenizer)
            length = prompt.num_tokens(NUM_VISION)
            if length > recipe.max_tokens:
                raise UnusableSample(_over_limit(length, recipe))  # noqa: TRY301
            lengths[entry.key] = length
        except UnusableSample as reason:
            skipped.append(Skipped(key=entry.key, reason=str(reason)))
    return lengths, skipped


def _match(where: Mapping[str, object], source: TeacherSource) -> dict[str, int]:
    """Lengths of the samples that are in the tars and in the cache."""
    known = source.keys()
    absent = [key for key in known if key not in where]
    if absent and len(absent) == len(known):
        raise TrainingError(
            f"none of the cache's {len(known)} samples is in --data (the first: {absent[0]!r}); "
            "give the tars that the cache was built from"
        )
    if absent:
        log.info("%d of the cache's %d samples are not in --data", len(absent), len(known))
    if unknown := len(where) - (len(known) - len(absent)):
        log.warning(
            "%d of the %d samples in --data are not in the cache and are left out; cache-tools "
            "info says what it skipped and whether its build is complete", unknown, len(where),
        )  # fmt: skip
    lengths = zip(known, source.lengths.tolist(), strict=True)
    return {key: length for key, length in lengths if key in where}


def _refuse_other_image(tar: Path, key: str, image: bytes | None, digest: bytes) -> None:
    """Equal sizes and places of all members, which are compared at the start, do not tell this."""
    found = None if image is None else hashlib.sha256(image).digest()
    if found != digest:
        raise MismatchError(
            f"sample {shown(key)}: its image in {tar} has sha256 {found.hex() if found else None}, "
            f"the one that the cache was built from {digest.hex()}; train on the tars that the "
            "cache was built from, or build a cache from these (build-cache into another folder)"
        )


def _over_limit(length: int, recipe: Recipe) -> str:
    return f"{length} tokens, at most {recipe.max_tokens}"


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
