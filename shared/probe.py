"""The probe: inputs of a few samples of each shard, so that others can recompute what it holds.

Equal identities say that teacher and student were set up alike; the probe shows that they see the
same. A trainer recomputes ids, labels and pixels with the student's own preprocessing; whoever has
the teacher recomputes its signals.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.bounds import MAX_PROBE_IMAGE, MAX_PROBE_TEXT
from shared.cache import Cache
from shared.errors import UnusableSample
from shared.expected import Expected
from shared.images import ImageProcessor, decode_image, pixels_digest
from shared.prompt import IMAGE_TOKEN, Prompt, build_prompt
from shared.reader import ShardReader
from shared.record import ShardRecord
from shared.samples import Sample, parse_sample
from shared.spec import Template
from shared.tokenizer import Tokenizer

TEXT, IMAGE = "probe_annotation", "probe_image"
"Arrays of a shard's group; their edges are in `<name>_offsets`."
_EXPECTED = {
    TEXT: Expected("uint8", ()), f"{TEXT}_offsets": Expected("int64", ()),
    IMAGE: Expected("uint8", ()), f"{IMAGE}_offsets": Expected("int64", ()),
}  # fmt: skip

Differences = dict[str, tuple[str, str]]
"What differs -> as the cache has it, as it was recomputed."


@dataclass(frozen=True, kw_only=True)
class ProbeInput:
    """What one sample was made from."""

    key: str
    "WebDataset key."
    annotation: bytes
    "Its JSON, as it lay in the tar."
    image: bytes | None
    "Its encoded image, as it lay in the tar; None for text only."
    pixels_sha256: str | None
    "Of the pixels that the teacher saw."

    def sample(self) -> Sample:
        """Parsed and checked as from a tar.

        Raises:
            UnusableSample: with the reason.
        """
        return parse_sample(self.key, self.annotation, self.image)


def read_probe(root: Path, record: ShardRecord) -> list[ProbeInput]:
    """The inputs that a shard stores.

    Raises:
        DamagedError: they are missing, too large, or not what was written.
    """
    if not record.probe:
        return []
    reader = ShardReader(root=root, record=record, expected=_EXPECTED)
    annotations = _pieces(reader, TEXT, MAX_PROBE_TEXT)
    images = _pieces(reader, IMAGE, MAX_PROBE_IMAGE)
    return [
        ProbeInput(
            key=sample.key, annotation=annotation, pixels_sha256=sample.pixels_sha256,
            image=None if sample.pixels_sha256 is None else image,
        )
        for sample, annotation, image in zip(record.probe, annotations, images, strict=True)
    ]  # fmt: skip


def compare_text(
    found: ProbeInput, cache: Cache, template: Template, tokenizer: Tokenizer
) -> Differences:
    """Ids, labels and place of the image, as they are stored and as this tokenizer makes them."""
    stored = cache.read_batch([found.key], signals=())
    try:
        prompt = build_prompt(found.sample().conversation, template, tokenizer)
    except UnusableSample as reason:
        return {"ids": (f"{len(stored.input_ids[0])} of them", f"none: {reason}")}
    return _unequal(
        ids=_first_difference(stored.input_ids[0], prompt.input_ids),
        labels=_first_difference(stored.labels[0], prompt.labels),
        vision_start=(_image_place(stored.input_ids[0]), _vision_start(prompt)),
    )


def compare_pixels(found: ProbeInput, processor: ImageProcessor) -> Differences:
    """Digest of the pixels, as it is stored and as this image processor gives it."""
    if found.image is None or found.pixels_sha256 is None:
        return {}
    try:
        pixels = pixels_digest(processor(decode_image(found.image)))
    except UnusableSample as reason:
        return {"pixels_sha256": (found.pixels_sha256, f"none: {reason}")}
    return _unequal(pixels_sha256=(found.pixels_sha256, pixels))


def compare_image(found: ProbeInput, cache: Cache) -> Differences:
    """Digest of the image's file, as the shard has it and as it is; nothing if it has none."""
    stored = cache.read_batch([found.key], signals=()).image_sha256[0]
    if stored is None or found.image is None:
        return {}
    return _unequal(image_sha256=(stored.hex(), hashlib.sha256(found.image).hexdigest()))


def _pieces(reader: ShardReader, name: str, largest: int) -> list[bytes]:
    """One flat array, cut at its offsets."""
    number = len(reader.record.probe)
    reader.check_rows(f"{name}_offsets", 0, number + 1)
    if name != IMAGE or reader.has(IMAGE):  # a shard of texts has no images
        reader.layout(name)
    edges = reader.rows(f"{name}_offsets", 0, number + 1).tolist()
    sizes = np.diff(edges).tolist()
    if not 0 <= min(sizes) <= max(sizes) <= largest:
        raise reader.damaged(f"{name} of {sizes} bytes, expected 0 to {largest} each")
    if not any(sizes):
        return [b""] * number
    return [
        reader.rows(name, begin, begin + size).tobytes()
        for begin, size in zip(edges, sizes, strict=False)
    ]


def _first_difference(
    stored: npt.NDArray[np.int32], found: npt.NDArray[np.int32]
) -> tuple[str, str]:
    shorter = min(len(stored), len(found))
    unequal = np.flatnonzero(stored[:shorter] != found[:shorter])
    place = int(unequal[0]) if len(unequal) else shorter
    return _shown(stored, place), _shown(found, place)


def _shown(ids: npt.NDArray[np.int32], place: int) -> str:
    return f"{len(ids)}" + (f", {ids[place]} at {place}" if place < len(ids) else "")


def _image_place(ids: npt.NDArray[np.int32]) -> str:
    places = np.flatnonzero(ids == IMAGE_TOKEN).tolist()
    return str(places[0]) if places else "none"


def _vision_start(prompt: Prompt) -> str:
    return "none" if prompt.vision_start is None else str(prompt.vision_start)


def _unequal(**pairs: tuple[str, str]) -> Differences:
    return {name: (stored, found) for name, (stored, found) in pairs.items() if stored != found}
