"""Shard records: the small JSON files that say which shards exist and what they are.

A record names its data folder, the digest of every file in it, the samples, what was skipped, and
the identity of everything that decided the bytes. It begins with the digest of the rest of itself,
so that no bit of it can change unnoticed. Records are read before anything else and validated
before use: a cache may come from a stranger.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from shared.bounds import (
    MAX_PROBE,
    FileSize,
    ImageRow,
    Key,
    Length,
    Sha256,
    check_files,
    check_identity,
    check_probe,
    check_samples,
    check_skipped,
)
from shared.errors import (
    CacheError,
    ConfigError,
    DamagedError,
    InputError,
    MismatchError,
    printable,
)
from shared.inside import folder_inside, list_inside, read_inside
from shared.readable import reading
from shared.sealed import MAX_BYTES, parse_json, seal, unseal
from shared.spec import CacheSpec
from shared.strict import parse, shown

FORMAT = 1
"Version of the layout on disk; written in every record, never guessed."
RECORDS, DATA = "records", "data"
"Folders of a cache."
_SPEC = {field.name for field in fields(CacheSpec)}
_HEX = re.compile("[0-9a-f]{8}")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
"What a shard may be called."


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a record is made of. Types and bounds are checked where JSON becomes such a thing."""


class StoredFile(_Part, frozen=True, kw_only=True, gc=False):
    """One file of a shard."""

    size: FileSize
    "Bytes."
    sha256: Sha256
    "Hexadecimal."


class TarFacts(_Part, frozen=True, kw_only=True):
    """The input tar of a shard."""

    name: str
    "File name, without folder."
    size: FileSize
    "Bytes."
    sha256: Sha256
    "Hexadecimal."
    index_sha256: Sha256
    "Over name, type, place and size of its members: compared where reading all is too slow."


class Skipped(_Part, frozen=True, kw_only=True):
    """A sample of the tar that is not in the shard."""

    key: str
    "WebDataset key."
    reason: str
    "Why."


class ProbeSample(_Part, frozen=True, kw_only=True):
    """A sample whose inputs are stored too, so that others can recompute what the shard holds."""

    key: str
    "WebDataset key."
    pixels_sha256: Sha256 | None
    "Of the image processor's output, float32 little endian; None for text only."


class ShardRecord(_Part, frozen=True, kw_only=True):
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
    keys: tuple[Key, ...]
    "Samples, in the order of the arrays' `sample` axis."
    lengths: tuple[Length, ...]
    "Tokens of each sample, vision tokens counted."
    images: tuple[ImageRow, ...]
    "Row of each sample on the `image` axis; -1 for text only."
    skipped: tuple[Skipped, ...]
    "Samples that could not be used."
    probe: tuple[ProbeSample, ...]
    "Samples whose inputs are stored, in the order of the `probe_*` arrays."
    files: dict[str, StoredFile]
    "Path relative to `data` -> size and digest."

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this version reads format {FORMAT}")
        if not NAME.fullmatch(self.name):
            raise ValueError(f"bad shard name {shown(self.name)}")
        folder, suffix = self.data[:-8], self.data[-8:]
        if folder != f"{DATA}/{self.name}-" or not _HEX.fullmatch(suffix):
            raise ValueError(f"data is {shown(self.data)}, expected data/{self.name}-<8 hex>")
        if self.tar.name.removesuffix(".tar") != self.name:
            raise ValueError(f"tar is {shown(self.tar.name)}, expected {self.name}.tar")
        check_identity(self.identity)
        # A person may leave some of a spec out; a record says all.
        if missing := _SPEC - self.identity["spec"].keys():
            raise ValueError(f"identity: spec has no {', '.join(sorted(missing))}")
        check_samples(self.keys, self.lengths, self.images)
        check_skipped([(sample.key, sample.reason) for sample in self.skipped])
        distinct = len({sample.key for sample in self.probe})
        if distinct != len(self.probe) or distinct > MAX_PROBE:
            raise ValueError(f"probe has a key twice, or over {MAX_PROBE} samples")
        check_files(self.files)

    def without_samples(self) -> "ShardRecord":
        """A copy that takes little memory, for those who keep the samples elsewhere."""
        bare = copy(self)
        for name in ("keys", "lengths", "images"):
            # Not `replace`: that would check all of it again.
            msgspec.structs.force_setattr(bare, name, ())
        return bare

    def to_json(self) -> bytes:
        """The record file's content.

        Raises:
            CacheError: it would be larger than a reader takes.
            DamagedError: a reader would refuse it for anything else.
        """
        content = seal(msgspec.to_builtins(self))
        if len(content) > MAX_BYTES:
            raise CacheError(
                f"shard {self.name}: its record would be {len(content)} bytes, at most "
                f"{MAX_BYTES}; put fewer samples into a tar (cache-tools pack --samples-per-tar)"
            )
        ShardRecord.parse(Path(f"{self.name}.json"), content)
        return content

    @classmethod
    def load(cls, root: Path, name: str, folder: int | None = None) -> "ShardRecord":
        """Read and validate `CACHE/records/<shard>.json`.

        Args:
            folder: a descriptor of `CACHE/records`, if that is open already.

        Raises:
            DamagedError: not a record, or not as it was written.
            MismatchError: a record of another format.
            CacheError: it cannot be read.
        """
        file = f"{RECORDS}/{name}.json"
        path = root / file
        with reading(path, CacheError):
            content = read_inside(root, file, MAX_BYTES, folder)
        record = cls.parse(path, content)
        if record.name != name:
            raise DamagedError(f"{path}: is the record of shard {record.name!r}")
        return record

    @classmethod
    def parse(cls, path: Path, content: bytes) -> "ShardRecord":
        """Validate the content of the record file `path`; raises as `load`."""
        try:
            json = unseal(path, content)
            record = _as_written(json) or _however_written(path, json)
            # Not in __post_init__: a Cache holds records without their samples.
            check_probe({s.key: s.pixels_sha256 for s in record.probe}, record.keys, record.images)
        except (ValueError, RecursionError) as error:
            raise DamagedError(
                f"{path}: not a record of format {FORMAT} ({printable(str(error), most=300)}); "
                f"cache-tools repair {path.parent.parent} removes it"
            ) from error
        return record


# msgspec's own floats take ten microseconds each where their exponent is large.
_DECODER = msgspec.json.Decoder(ShardRecord, float_hook=float)
_ENCODER = msgspec.json.Encoder()


def _as_written(json: bytes) -> ShardRecord | None:
    """The record, if the JSON is exactly what would be written of its values: then no key stands
    twice in it. That takes a third of the time of a parser which can tell, and fits nearly all.
    """
    try:
        record = _DECODER.decode(json)
        return record if _ENCODER.encode(record) == json else None
    except (ValueError, RecursionError):
        return None


def _however_written(path: Path, json: bytes) -> ShardRecord:
    values = parse_json(json)
    if not isinstance(values, dict):
        raise ValueError("not an object")  # noqa: TRY004  (one error for all)
    _check_format(path, values)
    return msgspec.convert(values, ShardRecord)


def _check_format(path: Path, values: Mapping[str, Any]) -> None:
    found = values.get("format")
    if type(found) is int and found != FORMAT:
        raise MismatchError(
            f"{path}: format {shown(found)} there, {FORMAT} here; use the version that wrote it, "
            "or a newer one that reads both"
        )
    if type(found) is int and "probe" not in values:
        raise MismatchError(
            f"{path}: a record without `probe` there, one with it here; it is of an older draft of "
            "format 1: build the cache again"
        )


def shard_name(tar: Path) -> str:
    """Name of the shard that is built from a tar: the file name without `.tar`.

    Raises:
        InputError: characters other than letters, digits, `.`, `_`, `-`.
    """
    name = tar.name.removesuffix(".tar")
    if not NAME.fullmatch(name):
        raise InputError(
            f"{tar}: rename it; a shard's name is made of letters, digits, '.', '_', '-'"
        )
    return name


def no_cache(root: Path, looked_for: str) -> CacheError:
    """The error for a folder that holds none of what was looked for."""
    return CacheError(
        f"{root}: no cache here (no {looked_for}); expected a folder that build-cache made"
    )


def record_names(root: Path) -> list[str]:
    """Names of the shards that have a record; whatever else lies beside the records is passed over.

    Raises:
        DamagedError: the folder of the records is a link.
        CacheError: it cannot be read.
    """
    with reading(root, CacheError):
        entries = list_inside(root, RECORDS)
    names = [entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".json")]
    return [name for name in names if NAME.fullmatch(name)]


def read_records(root: Path) -> dict[str, ShardRecord]:
    """All records of a cache by shard name; empty if there are none.

    Raises:
        DamagedError: a record is damaged.
        MismatchError: a record is of another format.
        CacheError: a record cannot be read.
    """
    return {record.name: record for record in iter_records(root)}


def iter_records(root: Path) -> Iterator[ShardRecord]:
    """All records of a cache, one by one, in order of their names; raises as `read_records`."""
    names = record_names(root)
    if not names:
        return
    with reading(root, CacheError), folder_inside(root, RECORDS) as folder:
        for name in names:
            yield ShardRecord.load(root, name, folder)


def spec_of(record: ShardRecord) -> CacheSpec:
    """The spec in a record's identity.

    Raises:
        DamagedError: it is not a spec that this version knows.
    """
    try:
        return parse(CacheSpec, record.identity["spec"], where=f"shard {record.name}: spec")
    except ConfigError as error:
        raise DamagedError(f"shard {record.name}: unreadable spec ({error})") from error


def sizes_by_array(records: Sequence[ShardRecord]) -> dict[str, int]:
    """Bytes on disk per array, over all shards."""
    sizes: dict[str, int] = {}
    for record in records:
        for file, stored in record.files.items():
            array = file.partition("/")[0]
            sizes[array] = sizes.get(array, 0) + stored.size
    return sizes
