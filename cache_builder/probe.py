"""The probe of a shard, made while it is committed: inputs of a few of its samples.

One with an image and one of text only: the first of each in the tar that are not too large.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from cache_builder.prepare import PreparedSample
from shared.bounds import MAX_PROBE_IMAGE, MAX_PROBE_TEXT
from shared.errors import InputError
from shared.images import ImageProcessor, decode_image, pixels_digest
from shared.probe import IMAGE, TEXT, ProbeInput
from shared.samples import SampleEntry, TarIndex, read_members
from shared.store import ShardWriter


def make_probe(
    index: TarIndex, samples: Sequence[PreparedSample], processor: ImageProcessor
) -> list[ProbeInput]:
    """Read the inputs of a tar's probe again.

    Args:
        samples: those of the tar that are stored.

    Raises:
        InputError: the tar cannot be read any more, or is another one now.
    """
    digests = {sample.key: sample.image_digest for sample in samples}
    chosen = choose(entry for entry in index.samples if entry.key in digests)
    return [_read(index, entry, digests[entry.key], processor) for entry in chosen]


def choose(entries: Iterable[SampleEntry]) -> list[SampleEntry]:
    """The first small sample with an image and the first small one without."""
    first: dict[bool, SampleEntry] = {}
    for entry in entries:
        image = 0 if entry.image is None else entry.image.size
        if entry.annotation.size <= MAX_PROBE_TEXT and image <= MAX_PROBE_IMAGE:
            first.setdefault(entry.image is None, entry)
        if len(first) == 2:
            break
    return [first[text_only] for text_only in sorted(first)]


def write_probe(shard: ShardWriter, probe: Sequence[ProbeInput]) -> None:
    """Put the inputs into flat arrays of bytes."""
    if not probe:
        return
    _put(shard, TEXT, [found.annotation for found in probe])
    _put(shard, IMAGE, [found.image or b"" for found in probe])


def _read(
    index: TarIndex, entry: SampleEntry, digest: str | None, processor: ImageProcessor
) -> ProbeInput:
    annotation, image = read_members(index.path, entry)
    if image is None:
        return ProbeInput(key=entry.key, annotation=annotation, image=None, pixels_sha256=None)
    if hashlib.sha256(image).hexdigest() != digest:
        raise InputError(f"{index.path}: changed while it was read; run the same command again")
    pixels = pixels_digest(processor(decode_image(image)))
    return ProbeInput(key=entry.key, annotation=annotation, image=image, pixels_sha256=pixels)


def _put(shard: ShardWriter, name: str, pieces: Sequence[bytes]) -> None:
    shard.put_offsets(f"{name}_offsets", [len(piece) for piece in pieces])
    if joined := b"".join(pieces):
        shard.put(name, np.frombuffer(joined, dtype=np.uint8), ("byte",))
