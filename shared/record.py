"""Shard records: the small JSON files that say which shards exist and what they are.

A record names its data folder, the digest of every file in it, the samples, what was skipped, and
the identity of everything that decided the bytes. Records are read before anything else and
validated before use: a cache may come from a stranger.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from shared.errors import CacheError, ConfigError, DamagedError, MismatchError
from shared.spec import CacheSpec
from shared.strict import build

FORMAT = 1
"Version of the layout on disk; written in every record, never guessed."
RECORDS, DATA, PLANS = "records", "data", "plans"
"Folders of a cache."
IDENTITY = ("spec", "teacher", "tokenizer", "image_processor", "numerics")
"Sections of an identity."
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file of a shard."""

    size: int
    "Bytes."
    sha256: str
    "Hexadecimal."


@dataclass(frozen=True, kw_only=True)
class TarFacts:
    """The input tar of a shard."""

    name: str
    "File name, without folder."
    size: int
    "Bytes."
    sha256: str
    "Hexadecimal."
    index_sha256: str
    "Over name, type, place and size of its members: compared where reading all is too slow."


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A sample of the tar that is not in the shard."""

    key: str
    "WebDataset key."
    reason: str
    "Why."


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One committed shard."""

    format: int
    "Version of the layout; this code reads 1."
    name: str
    "Shard name: the tar's without `.tar`."
    data: str
    "Folder of its Zarr group, relative to the cache: `data/<name>-<8 hex>`."
    identity: dict[str, Any]
    "What decided the bytes besides the tar: spec, teacher, tokenizer, image processor, numerics."
    tar: TarFacts
    "What was read."
    keys: tuple[str, ...]
    "Samples, in the order of the arrays' `sample` axis."
    lengths: tuple[int, ...]
    "Tokens of each sample, vision tokens counted."
    images: tuple[int, ...]
    "Row of each sample on the `image` axis; -1 for text only."
    skipped: tuple[Skipped, ...]
    "Samples that could not be used."
    files: dict[str, StoredFile]
    "Path relative to `data` -> size and digest."

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this version reads format {FORMAT}")
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"bad shard name {self.name!r}")
        if not re.fullmatch(rf"{DATA}/{re.escape(self.name)}-[0-9a-f]{{8}}", self.data):
            raise ValueError(f"data is {self.data!r}, expected data/{self.name}-<8 hex digits>")
        for file in self.files:
            if file.startswith("/") or ".." in PurePosixPath(file).parts or "\\" in file:
                raise ValueError(f"path {file!r} leaves the shard")
        for section in IDENTITY:
            if not isinstance(self.identity.get(section), dict):
                raise ValueError(f"identity has no {section}")  # noqa: TRY004  (one error for all)
        if not len(self.keys) == len(self.lengths) == len(self.images):
            raise ValueError("keys, lengths and images differ in number")
        if len(set(self.keys)) != len(self.keys):
            raise ValueError("a key stands twice")

    def to_json(self) -> str:
        """The record file's text."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=True, separators=(",", ":"))

    @classmethod
    def load(cls, path: Path) -> "ShardRecord":
        """Read and validate.

        Raises:
            DamagedError: not JSON or not a record.
        """
        try:
            values = json.loads(path.read_bytes())
            record = build(cls, values, where=str(path))
        except (ValueError, RecursionError, ConfigError) as error:
            raise DamagedError(f"{path}: not a record of format {FORMAT} ({error})") from error
        if record.name != path.stem:
            raise DamagedError(f"{path}: is the record of shard {record.name!r}")
        return record


def shard_name(tar: Path) -> str:
    """Name of the shard that is built from a tar: the file name without `.tar`.

    Raises:
        CacheError: characters other than letters, digits, `.`, `_`, `-`.
    """
    name = tar.name.removesuffix(".tar")
    if not _NAME.fullmatch(name):
        raise CacheError(
            f"{tar}: rename it; a shard's name is made of letters, digits, '.', '_', '-'"
        )
    return name


def read_records(root: Path) -> dict[str, ShardRecord]:
    """All records of a cache by shard name; empty if there are none.

    Raises:
        DamagedError: a record cannot be read.
    """
    return {record.name: record for record in iter_records(root)}


def iter_records(root: Path) -> Iterator[ShardRecord]:
    """All records of a cache, one by one, in order of their names.

    Raises:
        DamagedError: a record cannot be read.
    """
    for path in sorted((root / RECORDS).glob("*.json")):
        yield ShardRecord.load(path)


def compare(
    name: str,
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    advice: str,
    accept: Collection[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """Refuse two identities that differ.

    Args:
        name: whose identity `found` is, for the message.
        advice: what to do about it.
        accept: values, or sections of them, that may differ: `template`, `tokenizer`.

    Returns:
        What differs and is accepted: its name, the value found, the value expected.

    Raises:
        MismatchError: names up to three differing values, both sides.
    """
    unequal, accepted = [], {}
    for path, ours, theirs in differences(found, expected):
        if any(path == one or path.startswith(f"{one}.") for one in accept):
            accepted[path] = (ours, theirs)
        else:
            unequal.append((path, ours, theirs))
    if unequal:
        shown = "; ".join(
            f"{path}: {ours!r} there, {theirs!r} here" for path, ours, theirs in unequal[:3]
        )
        more = f" (and {len(unequal) - 3} more)" if len(unequal) > 3 else ""
        raise MismatchError(f"{name} does not fit: {shown}{more}. {advice}")
    return accepted


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, value in one, value in other) for every leaf that differs."""
    for key in sorted({*one, *other}):
        ours, theirs = one.get(key), other.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from differences(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs:
            yield f"{prefix}{key}", ours, theirs


def spec_of(record: ShardRecord) -> CacheSpec:
    """The spec in a record's identity.

    Raises:
        DamagedError: it is not a spec that this version knows.
    """
    try:
        return build(CacheSpec, record.identity["spec"], where=f"shard {record.name}: spec")
    except (KeyError, ConfigError) as error:
        raise DamagedError(f"shard {record.name}: unreadable spec ({error})") from error


def sizes_by_array(records: Sequence[ShardRecord]) -> dict[str, int]:
    """Bytes on disk per array, over all shards."""
    sizes: dict[str, int] = {}
    for record in records:
        for file, stored in record.files.items():
            array = file.partition("/")[0]
            sizes[array] = sizes.get(array, 0) + stored.size
    return sizes
