"""What the values of a record may be, so that whoever uses them need not ask again.

Bounds on one value are part of its type (msgspec checks them where it parses); every function
raises ValueError with what was found and what was expected.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

from msgspec import Meta

from shared.strict import shown

IDENTITY = ("spec", "teacher", "tokenizer", "image_processor", "numerics")
"Sections of an identity."
MAX_SAMPLES = 100_000
"Most samples of a tar, stored and skipped ones each."
MAX_TEXT = 512
"Longest sample key; a skip reason may be twice as long."
MAX_TOKENS = 2**31 - 1
"Longest sequence."
MAX_TOP_K = 2**25
"Most log-probabilities of a response position: in float32 they fill the largest chunk."
MAX_LAYERS = 1000
"Most decoder layers whose attention is stored; they are numbered below it."
MAX_PROBE = 8
"Most samples of a shard whose inputs are stored."
MAX_PROBE_TEXT, MAX_PROBE_IMAGE = 2**20, 4 * 2**20
"Bytes of such a sample's annotation and of its encoded image."
_MAX_FILES, _MAX_LEAVES, _MAX_DEPTH, _MAX_STRING = 10_000, 10_000, 8, 10_000
_MAX_CONTAINERS = 200_000
_INT64 = 2**63 - 1
_PART = "[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"
_FILE_NAME = re.compile(rf"{_PART}(/{_PART}){{0,7}}")

FileSize = Annotated[int, Meta(ge=0, le=_INT64)]
"Bytes."
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
"Hexadecimal."
Key = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)]
"Of a sample; that it can be printed is checked for all keys at once."
Length = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
"Tokens of a sequence."
ImageRow = Annotated[int, Meta(ge=-1)]
"Of a shard; -1 for text only."

_LOOKED_UP: dict[str, dict[str, type]] = {
    "teacher": {
        "hidden_size": int,
        "attention_heads": int,
        "vision_tokens": int,
        "vocab_size": int,
        "weights_sha256": str,
    },
    "tokenizer": {"vocab_size": int, "vocab_sha256": str},
    "numerics": {"dtype": str},
}
"What readers, tools and train-student look up in an identity besides its spec."
_MAX_COUNT = 2**31 - 1
"Of a number among them."


def check_containers(json: bytes) -> None:
    """Lists and objects in JSON, before it is parsed: an empty one takes 2 bytes of text and 60 of
    memory.
    """
    number = json.count(b"[") + json.count(b"{")
    if number > _MAX_CONTAINERS:
        raise ValueError(f"{number} lists and objects, at most {_MAX_CONTAINERS}")


def check_range(name: str, value: int, least: int, most: int) -> None:
    """A number of a spec."""
    if not least <= value <= most:
        raise ValueError(f"{name} must be {least} to {most}, found {shown(value)}")


def check_identity(identity: Mapping[str, Any]) -> None:
    """All sections, what is looked up in them, and nothing deep or long besides."""
    if unknown := [*identity.keys() - set(IDENTITY)]:
        raise ValueError(f"identity has {shown(sorted(unknown)[:3])} besides {', '.join(IDENTITY)}")
    for section in IDENTITY:
        if not isinstance(identity.get(section), dict):
            raise ValueError(f"identity has no {section}")  # noqa: TRY004  (one error for all)
    _check_extent(identity)
    for section, fields in _LOOKED_UP.items():
        for field, kind in fields.items():
            value = identity[section].get(field)
            if type(value) is not kind:
                raise ValueError(
                    f"identity: {section}.{field} is {shown(value)}, expected {kind.__name__}"
                )
            if isinstance(value, int):
                check_range(f"identity: {section}.{field}", value, 1, _MAX_COUNT)


def _check_extent(identity: Mapping[str, Any]) -> None:
    """Walked level by level: what is compared and printed later is neither deep nor long."""
    level: list[Any] = [identity]
    seen = 1
    for _ in range(_MAX_DEPTH + 1):
        inner: list[Any] = []
        for value in level:
            if not isinstance(value, dict | list):
                _check_leaf(value)
                continue
            seen += len(value) * (2 if isinstance(value, dict) else 1)
            if seen > _MAX_LEAVES:  # before any of them is looked at
                raise ValueError(f"identity has over {_MAX_LEAVES} values")
            inner += [*value, *value.values()] if isinstance(value, dict) else value
        level = inner
    if level:
        raise ValueError(f"identity has over {_MAX_DEPTH} levels")


def _check_leaf(value: object) -> None:
    if isinstance(value, str) and len(value) > _MAX_STRING:
        raise ValueError(f"identity holds a text of {len(value)} characters")
    # An int of 400 digits is no float.
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"identity holds the number {value}")
    if isinstance(value, int | float) and abs(value) > _INT64:
        raise ValueError(f"identity holds the number {shown(value)}")


def check_samples(keys: Sequence[str], lengths: Sequence[int], images: Sequence[int]) -> None:
    """As many of each, keys that differ and can be printed, images that are there."""
    if not len(keys) == len(lengths) == len(images):
        raise ValueError("keys, lengths and images differ in number")
    if len(keys) > MAX_SAMPLES:
        raise ValueError(f"{len(keys)} samples, at most {MAX_SAMPLES}")
    if not keys:
        return
    if len(set(keys)) != len(keys):
        raise ValueError("a key stands twice")
    if not "".join(keys).isprintable():
        raise ValueError("a key cannot be printed")
    if max(images) >= len(keys):
        raise ValueError(f"image {max(images)}, expected -1 to {len(keys) - 1}")


def check_skipped(skipped: Sequence[tuple[str, str]]) -> None:
    """Keys and reasons; neither need be a key that could be stored."""
    if len(skipped) > MAX_SAMPLES:
        raise ValueError(f"{len(skipped)} skipped samples, at most {MAX_SAMPLES}")
    for key, reason in skipped:
        if len(key) > 2 * MAX_TEXT or len(reason) > 2 * MAX_TEXT:
            raise ValueError(f"skipped {shown(key)}: key or reason too long")


def check_probe(
    probe: Mapping[str, str | None], keys: Sequence[str], images: Sequence[int]
) -> None:
    """Samples of the shard, and a digest of pixels for those that have an image."""
    for key, digest in probe.items():
        if key not in keys:
            raise ValueError(f"probe {shown(key)} is no sample of the shard")
        image = images[keys.index(key)]
        if (digest is None) != (image < 0):
            raise ValueError(f"probe {shown(key)}: pixels_sha256 is {shown(digest)}, image {image}")


def check_files(files: Collection[str]) -> None:
    """Paths below a shard's data folder: no way out of it, no hidden name."""
    if len(files) > _MAX_FILES:
        raise ValueError(f"{len(files)} files, at most {_MAX_FILES}")
    for file in files:
        if not _FILE_NAME.fullmatch(file):
            raise ValueError(f"path {shown(file)} leaves the shard or has odd characters")
