"""The parity probe: does the student see what the teacher saw? Asked before a run starts."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from shared.cache import Cache
from shared.identity import compare
from shared.images import ImageProcessor
from shared.probe import Differences, ProbeInput, compare_pixels, compare_text, read_probe
from shared.samples import spread
from shared.tokenizer import Tokenizer
from student_train.config import Recipe

log = logging.getLogger(__name__)

_MOST_SHARDS = 8
"Probed at a start; each takes some ten milliseconds an image."
_TEXT, _PIXELS = ("template", "tokenizer"), ("image_aspect", "image_processor")
"Parts of the identity that decide the sequence and the pixels."


def check_probe(
    cache: Cache,
    recipe: Recipe,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    *,
    accept: Sequence[str],
    accepted: Mapping[str, Any],
) -> dict[str, tuple[Any, Any]]:
    """Refuse a student whose preprocessing gives other ids, labels or pixels than the cache has.

    Args:
        accepted: what of the identities differs and was accepted: not asked a second time.

    Returns:
        What differs and is accepted.

    Raises:
        MismatchError: names samples, what the cache has and what was found.
        DamagedError: the probe cannot be read.
    """
    begin = time.monotonic()
    sections = {name.partition(".")[0] for name in accepted}
    shards = spread([name for name, record in cache.records.items() if record.probe], _MOST_SHARDS)
    probe = [found for name in shards for found in read_probe(cache.root, cache.records[name])]

    def differences(found: ProbeInput) -> Differences:
        text = {} if sections & set(_TEXT) else compare_text(
            found, cache, recipe.template, tokenizer
        )  # fmt: skip
        return text | ({} if sections & set(_PIXELS) else compare_pixels(found, processor))

    unequal = {found.key: differences(found) for found in probe}
    advice = (
        "The student's preprocessing does not give what the teacher saw, though its settings are "
        "equal: use the versions of Pillow, numpy, transformers and this package that the cache "
        "was built with, build it again with these, or name probe in --accept-mismatch, which the "
        "run and its export will say"
    )
    found = compare(
        f"cache {cache.root}", {"probe": _side(unequal, 0)}, {"probe": _side(unequal, 1)}, advice,
        accept,
    )  # fmt: skip
    log.info(
        "probe shards=%d samples=%d unequal=%d seconds=%.2f", len(shards), len(probe), len(found),
        time.monotonic() - begin,
    )  # fmt: skip
    return found


def _side(unequal: Mapping[str, Differences], side: int) -> dict[str, dict[str, str]]:
    return {
        key: {name: pair[side] for name, pair in found.items()} for key, found in unequal.items()
    }
