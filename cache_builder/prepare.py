"""The reading half of a build: a tar's samples as prompts, its images as pixels.

Everything here runs in threads ahead of the teacher (see `build.py`). Prompts of a whole tar are
small and come first, because they decide the batches; pixels are large and come a few batches at a
time, each distinct image once.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from cache_builder.ahead import Ahead
from shared.errors import UnusableSample
from shared.images import ImageProcessor, decode_image
from shared.mobilevlm import NUM_VISION
from shared.prompt import IGNORE, Prompt, build_prompt, check_length
from shared.record import Skipped
from shared.samples import Sample, TarIndex, read_sample, skipped_by_headers
from shared.spec import CacheSpec
from shared.tokenizer import Tokenizer

_PIXEL_BATCHES_AHEAD = 2
"Of each tar: one being made while the teacher runs on another. 22 MB each (16 images of 336)."


@dataclass(kw_only=True)
class PreparedSample:
    """A sample that fits: its prompt, and its image's bytes while those are needed."""

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

    @property
    def num_text_rows(self) -> int:
        """Text positions after the image, Q; 0 for text only."""
        start = self.prompt.vision_start
        return 0 if start is None else self.num_tokens - start - NUM_VISION

    @property
    def num_responses(self) -> int:
        """Positions whose next token carries a label, R."""
        return int((self.prompt.labels[1:] != IGNORE).sum())


@dataclass(frozen=True, kw_only=True)
class PixelBatch:
    """Distinct images, ready for the tower."""

    digests: tuple[str, ...]
    "sha256 of the encoded images, in the order of `pixels`."
    pixels: Float32[Tensor, "N 3 S S"]
    "Normalised."
    unusable: dict[str, str]
    "Digests of images that are not in `pixels` -> the reason."


@dataclass(kw_only=True)
class PreparedTar:
    """A tar that the teacher can run on: prompts in memory, pixels on their way."""

    index: TarIndex
    "The tar."
    samples: list[PreparedSample] = field(default_factory=list)
    "Those that fit, in the tar's order."
    skipped: list[Skipped] = field(default_factory=list)
    "The others."
    batches: list[list[PreparedSample]] = field(default_factory=list)
    "`samples` by length."
    pixels: Iterator[PixelBatch] = field(default_factory=lambda: iter(()))
    "Every distinct image once, in the order in which `batches` need them."


def prepare(
    tar: TarIndex, spec: CacheSpec, tokenizer: Tokenizer
) -> Iterator[PreparedSample | Skipped]:
    """Read a tar's samples and build their prompts; those that cannot be used come as Skipped."""
    yield from skipped_by_headers([tar])
    for entry in tar.samples:
        try:
            yield prepare_sample(read_sample(tar.path, entry), spec, tokenizer)
        except UnusableSample as reason:
            yield Skipped(key=entry.key, reason=str(reason))


class TarReader:
    """Prepares tars; holds the threads that decode images."""

    def __init__(
        self,
        spec: CacheSpec,
        tokenizer: Tokenizer,
        processor: ImageProcessor,
        *,
        batch_size: int,
        pin: bool,
    ) -> None:
        """`batch_size`: of samples and of images. `pin`: pixels go to a CUDA device."""
        self._spec, self._tokenizer, self._processor = spec, tokenizer, processor
        self._batch_size, self._pin = batch_size, pin
        self._batch_pool = ThreadPoolExecutor(_PIXEL_BATCHES_AHEAD, "pixels")
        self._image_pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "image")

    def __enter__(self) -> "TarReader":
        return self

    def __exit__(self, *_: object) -> None:
        # The batches first: they wait for images.
        self._batch_pool.shutdown(cancel_futures=True)
        self._image_pool.shutdown(cancel_futures=True)

    def __call__(self, index: TarIndex) -> PreparedTar:
        """Read a tar, plan its batches and start on its first images."""
        tar = PreparedTar(index=index)
        images: dict[str, bytes] = {}
        for item in prepare(index, self._spec, self._tokenizer):
            if isinstance(item, Skipped):
                tar.skipped.append(item)
                continue
            if item.image is not None and item.image_digest is not None:
                images.setdefault(item.image_digest, item.image)
                item.image = None
            tar.samples.append(item)
        tar.batches = batches_by_length(tar.samples, self._batch_size)
        tar.pixels = Ahead(
            lambda digests: self._decode({d: images.pop(d) for d in digests}),
            image_batches(tar.batches, self._batch_size),
            self._batch_pool,
            _PIXEL_BATCHES_AHEAD,
        )
        return tar

    def _decode(self, images: dict[str, bytes]) -> PixelBatch:
        return decode_images(images, self._processor, self._image_pool, pin=self._pin)


def batches_by_length(
    samples: Sequence[PreparedSample], batch_size: int
) -> list[list[PreparedSample]]:
    """Samples of similar length together, so that little is padded."""
    ordered = sorted(samples, key=lambda sample: (sample.num_tokens, sample.key))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def image_batches(
    batches: Sequence[Sequence[PreparedSample]], batch_size: int
) -> Iterator[tuple[str, ...]]:
    """Digests of the distinct images in the order in which `batches` need them."""
    order = [s.image_digest for batch in batches for s in batch if s.image_digest is not None]
    distinct = tuple(dict.fromkeys(order))
    for start in range(0, len(distinct), batch_size):
        yield distinct[start : start + batch_size]


def decode_images(
    images: dict[str, bytes], processor: ImageProcessor, pool: Executor, *, pin: bool
) -> PixelBatch:
    """Pixels of encoded images by digest; `images` is emptied."""

    def decode(digest: str) -> Float32[np.ndarray, "3 S S"] | UnusableSample:
        try:
            return processor(decode_image(images.pop(digest)))
        except UnusableSample as reason:
            return reason

    digests = tuple(images)
    found = dict(zip(digests, pool.map(decode, digests), strict=True))
    good = {d: pixels for d, pixels in found.items() if not isinstance(pixels, UnusableSample)}
    unusable = {d: str(why) for d, why in found.items() if isinstance(why, UnusableSample)}
    stacked = np.stack(list(good.values())) if good else np.zeros((0, 3, 1, 1), dtype=np.float32)
    pixels = torch.from_numpy(stacked)
    return PixelBatch(
        digests=tuple(good), pixels=pixels.pin_memory() if pin else pixels, unusable=unusable
    )


def prepare_sample(sample: Sample, spec: CacheSpec, tokenizer: Tokenizer) -> PreparedSample:
    """Build a sample's prompt.

    Raises:
        UnusableSample: it has none, or one that is too long.
    """
    prompt = build_prompt(sample.conversation, spec.template, tokenizer)
    check_length(prompt.num_tokens(NUM_VISION), spec.max_tokens)
    return PreparedSample(
        key=sample.key, prompt=prompt, image=sample.image, image_digest=sample.image_digest
    )
