"""What differs between two caches, from their records alone."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from shared.identity import differences
from shared.record import ShardRecord, no_cache, read_records


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePlace:
    """What a record says of one sample."""

    length: int
    "Tokens, vision tokens counted."
    row: int | None
    "On the `sample` axis; None where the two shards do not hold the same samples."
    image: int | None
    "Row on the `image` axis, -1 for text only; None as `row`."


@dataclass(frozen=True, kw_only=True)
class ShardDiff:
    """How one shard differs."""

    identity: dict[str, tuple[Any, Any]]
    "As the caches', but for what differs so in all shards."
    tar: dict[str, tuple[Any, Any]]
    "Name, size or sha256 of the input tar -> value in A, value in B."
    keys_only_in_a: tuple[str, ...]
    "Samples."
    keys_only_in_b: tuple[str, ...]
    "Samples."
    samples: dict[str, tuple[SamplePlace, SamplePlace]]
    "Of the samples in both, those that lie elsewhere or have another length: in A, in B."
    skipped: dict[str, tuple[str | None, str | None]]
    "Key -> reason in A, reason in B; None where it is not skipped."
    probe: dict[str, tuple[str | None, str | None]]
    "Key -> digest of its pixels in A, in B; None where it is not probed."
    arrays: dict[str, tuple[str | None, str | None]]
    "Array -> digest in A, digest in B; None where there is none."

    def __bool__(self) -> bool:
        return any(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class CacheDiff:
    """How two caches differ; all empty if they hold the same."""

    identity: dict[str, tuple[Any, Any]]
    "Dotted path -> value in A, value in B, in all shards that are in both."
    shards_only_in_a: tuple[str, ...]
    "Names."
    shards_only_in_b: tuple[str, ...]
    "Names."
    shards: dict[str, ShardDiff]
    "Of the shards in both, those that differ."
    equal: int
    "Shards that are in both and hold the same."

    def __bool__(self) -> bool:
        return bool(self.identity or self.shards_only_in_a or self.shards_only_in_b or self.shards)


def diff_caches(a: Path, b: Path) -> CacheDiff:
    """Compare two caches by their records.

    Raises:
        CacheError: one of them is no cache.
        DamagedError: a record is damaged.
    """
    ours, theirs = _read(a), _read(b)
    both = [name for name in ours if name in theirs]
    first = (next(iter(ours)), next(iter(theirs)))
    compared = [(name, name) for name in both] or [first]
    identities = [_pairs(ours[a].identity, theirs[b].identity) for a, b in compared]
    common = _common(identities)
    shards = {
        name: _diff_shard(ours[name], theirs[name], _without(identity, common))
        for name, identity in zip(both, identities, strict=False)
    }
    return CacheDiff(
        identity=common,
        shards_only_in_a=tuple(name for name in ours if name not in theirs),
        shards_only_in_b=tuple(name for name in theirs if name not in ours),
        shards={name: found for name, found in shards.items() if found},
        equal=sum(not found for found in shards.values()),
    )


def array_digests(record: ShardRecord) -> dict[str, str]:
    """Array -> sha256 over names and digests of its files."""
    digests: dict[str, Any] = {}
    for file in sorted(record.files):
        array = file.partition("/")[0] if "/" in file else ""
        digest = digests.setdefault(array, hashlib.sha256())
        digest.update(f"{file} {record.files[file].sha256}\n".encode())
    return {array or "group": digest.hexdigest() for array, digest in digests.items()}


def _read(root: Path) -> dict[str, ShardRecord]:
    records = read_records(root)
    if not records:
        raise no_cache(root, "records/*.json")
    return records


def _common(each: Sequence[Mapping[str, tuple[Any, Any]]]) -> dict[str, tuple[Any, Any]]:
    """What stands in all of them: shards of one folder may be of different builds."""
    first, *others = each
    return {
        path: pair
        for path, pair in first.items()
        if all(path in other and other[path] == pair for other in others)
    }


def _without(
    pairs: Mapping[str, tuple[Any, Any]], common: Mapping[str, tuple[Any, Any]]
) -> dict[str, tuple[Any, Any]]:
    return {path: pair for path, pair in pairs.items() if path not in common}


def _diff_shard(
    ours: ShardRecord, theirs: ShardRecord, identity: dict[str, tuple[Any, Any]]
) -> ShardDiff:
    a, b = set(ours.keys), set(theirs.keys)
    skips = [{s.key: s.reason for s in record.skipped} for record in (ours, theirs)]
    probes = [
        {s.key: s.pixels_sha256 or "text only" for s in record.probe} for record in (ours, theirs)
    ]
    return ShardDiff(
        identity=identity,
        tar=_pairs(asdict(ours.tar), asdict(theirs.tar)),
        keys_only_in_a=tuple(key for key in ours.keys if key not in b),
        keys_only_in_b=tuple(key for key in theirs.keys if key not in a),
        samples=_diff_samples(ours, theirs, with_rows=a == b),
        skipped=_pairs(*skips),
        probe=_pairs(*probes),
        arrays=_pairs(array_digests(ours), array_digests(theirs)),
    )


def _diff_samples(
    ours: ShardRecord, theirs: ShardRecord, *, with_rows: bool
) -> dict[str, tuple[SamplePlace, SamplePlace]]:
    """Without rows where one sample is missing: all behind it have another one."""
    if (ours.keys, ours.lengths, ours.images) == (theirs.keys, theirs.lengths, theirs.images):
        return {}
    one, other = _places(ours, with_rows=with_rows), _places(theirs, with_rows=with_rows)
    return {
        key: (place, other[key])
        for key, place in one.items()
        if key in other and place != other[key]
    }


def _places(record: ShardRecord, *, with_rows: bool) -> dict[str, SamplePlace]:
    samples = enumerate(zip(record.keys, record.lengths, record.images, strict=True))
    return {
        key: SamplePlace(
            length=length, row=row if with_rows else None, image=image if with_rows else None
        )
        for row, (key, length, image) in samples
    }


def _pairs(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {path: (one, other) for path, one, other in differences(ours, theirs)}
