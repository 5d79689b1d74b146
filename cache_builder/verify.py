"""Comparing a cache with what its records say of it: every file, and on request every value."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cache_builder.gc import find_leftovers
from cache_builder.values import wrong_digests, wrong_value
from shared.cache import Cache, open_cache
from shared.errors import CacheError, DamagedError, MismatchError
from shared.identity import differences
from shared.inside import Entry, list_inside, open_inside, walk_inside
from shared.plan import PLANS, plan_files, read_plan
from shared.probe import compare_image, read_probe
from shared.progress import IMPORTING, announced, progress
from shared.readable import sha256_of
from shared.reader import ShardReader
from shared.record import DATA, RECORDS, ShardRecord, no_cache, record_names
from shared.strict import shown

Advance = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    kind: Literal["shard", "plan", "cache", "stray", "targets", "unreadable"]
    """What it spoils:

    - shard: a shard, which can be rebuilt
    - plan: a plan, which nothing needs
    - cache: the whole, whose shards do not belong together or lie elsewhere
    - stray: nothing that is read, but a cache holds no such thing
    - targets: a shard that is as it was written, but does not hold what the teacher gives
    - unreadable: nothing for all that is known; the system does not let a shard or plan be read
    """
    place: str
    "The shard's name, or the plan's file; empty if it is neither."
    file: str
    "The file, relative to the shard's data folder or to the cache; empty if it is none in itself."
    what: str
    "What was found and what was expected."

    def __str__(self) -> str:
        if not self.file and self.place in self.what:
            return self.what  # an error of the reading code, which names the place itself
        return ": ".join(part for part in (self.place, self.file, self.what) if part)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a check found."""

    shards: int
    "Records, also those that are damaged."
    files: int
    "Files that the records name."
    size: int
    "Their bytes."
    samples: int
    "Samples that were read value by value; 0 if that was not asked for."
    problems: tuple[Problem, ...]
    "All that is wrong; empty if nothing is."
    leftovers: int | None
    "Things that no record names; None if a damaged record leaves that open."
    pending: int
    "Planned shards that are not committed."
    recomputed: int = 0
    "Samples of the probe that a teacher computed again."
    unchecked: tuple[str, ...] = ()
    "Of samples and targets what was to be checked, but the cache cannot be opened as a whole."

    @property
    def bad_shards(self) -> list[str]:
        """Shards that have to be rebuilt. None of `unreadable`, whatever else is wrong with it: a
        disk that fails may say anything.
        """
        return sorted(self._places("shard") - self._places("unreadable"))

    @property
    def unreadable(self) -> list[str]:
        """Shards and plans of which a part cannot be read; they may be whole."""
        return sorted(self._places("unreadable"))

    @property
    def beyond_repair(self) -> list[Problem]:
        """What taking shards and plans out does not solve, though it can be read."""
        return [problem for problem in self.problems if problem.kind in ("cache", "stray")]

    def _places(self, kind: str) -> set[str]:
        return {problem.place for problem in self.problems if problem.kind == kind}


def verify_targets(
    root: Path, report: Report, teacher: str, *, vision_tower: str | None, device: str | None
) -> Report:
    """The same report, and in it what a teacher says of the probe of the shards that are whole.

    Raises:
        MismatchError: it is not the cache's teacher.
    """
    try:
        cache = open_cache(root)
    except CacheError:  # why is among the problems already
        return replace(report, unchecked=(*report.unchecked, "targets"))
    with announced(IMPORTING):  # here: `verify` alone does without torch
        from cache_builder.recompute import load_for, recompute

    builder = load_for(cache, teacher, vision_tower, device)
    bad = {*report.bad_shards, *report.unreadable}
    whole = [name for name in cache.records if name not in bad]
    samples, problems = recompute(cache, builder, whole)
    return replace(report, recomputed=samples, problems=(*report.problems, *problems))


def verify_cache(root: Path, *, workers: int, decode: bool) -> Report:
    """Check records, plans and every byte of every shard.

    Args:
        workers: shards checked at the same time.
        decode: also read every sample through the reading API and check its values.

    Raises:
        CacheError: no cache here, or it cannot be read.
        DamagedError: a folder of the cache itself is a link.
    """
    records, problems = _load_records(root)
    planned, bad_plans = _load_plans(root)
    if not records and not problems and not planned and not bad_plans:
        raise no_cache(root, "records or plans")
    problems += bad_plans
    problems += _misfits(records)
    problems += (odd := [*_links(root, records)])
    if not any(problem.file == DATA for problem in odd):
        problems += _check_files(root, records.values(), workers)
    samples = 0
    unchecked: tuple[str, ...] = ()
    if decode and not _opens(records, problems):
        unchecked = ("samples",)
    elif decode and records:
        samples, wrong = _check_values(root, records, problems, workers)
        problems += wrong
    return Report(
        shards=len(record_names(root)),
        files=sum(len(record.files) for record in records.values()),
        size=_size(records.values()),
        samples=samples,
        problems=tuple(problems),
        leftovers=_count_leftovers(root),
        pending=len(planned - set(record_names(root))),
        unchecked=unchecked,
    )


def _load_records(root: Path) -> tuple[dict[str, ShardRecord], list[Problem]]:
    records, problems = {}, []
    for name in record_names(root):
        try:
            records[name] = ShardRecord.load(root, name)
        except MismatchError as error:  # of another version: whole, for all that is known
            problems.append(Problem(kind="cache", place=name, file="", what=str(error)))
        except DamagedError as error:
            problems.append(Problem(kind="shard", place=name, file="", what=str(error)))
        except CacheError as error:
            problems.append(Problem(kind="unreadable", place=name, file="", what=str(error)))
    return records, problems


def _load_plans(root: Path) -> tuple[set[str], list[Problem]]:
    planned: set[str] = set()
    problems = []
    for file in plan_files(root):
        try:
            planned |= set(read_plan(root, file))
        except DamagedError as error:
            problems.append(Problem(kind="plan", place=file, file="", what=str(error)))
        except CacheError as error:
            problems.append(Problem(kind="unreadable", place=file, file="", what=str(error)))
    return planned, problems


def _misfits(records: Mapping[str, ShardRecord]) -> Iterator[Problem]:
    """Shards that are whole but do not belong together."""
    first = next(iter(records.values()), None)
    owners: dict[str, str] = {}
    for name, record in records.items():
        assert first is not None
        for path, ours, theirs in differences(record.identity, first.identity):
            what = f"identity: {path} is {shown(ours)}, in shard {first.name} {shown(theirs)}"
            yield Problem(kind="cache", place=name, file="", what=what)
        twins = [key for key in record.keys if owners.setdefault(key, name) != name]
        if twins:
            what = f"{len(twins)} samples stand in shard {owners[twins[0]]} too: {shown(twins[0])}"
            yield Problem(kind="cache", place=name, file="", what=what)


def _links(root: Path, records: Mapping[str, ShardRecord]) -> Iterator[Problem]:
    """Links and special files in the cache's own folders, beside what is looked at for itself."""
    read = {f"{RECORDS}/{name}.json" for name in record_names(root)}
    read |= {*plan_files(root), *(record.data for record in records.values())}
    for folder in ("", RECORDS, PLANS, DATA):
        try:
            entries = list_inside(root, folder)
        except (DamagedError, OSError):  # `data`: a link, which was found before, or unreadable
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}".lstrip("/")
            if entry.kind not in ("link", "special file") or path in read:
                continue
            what = f"is a {entry.kind}; a cache is made of folders and files alone: "
            if path == DATA:
                what += "copy the cache with cp -rL"
                yield Problem(kind="cache", place="", file=path, what=what)
            else:
                yield Problem(kind="stray", place="", file=path, what=f"{what}delete it")


def _check_files(root: Path, records: Collection[ShardRecord], workers: int) -> Iterator[Problem]:
    with (
        progress("verify", "B", total=_size(records)) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for found in pool.map(lambda record: _check_shard(root, record, bar.update), records):
            yield from found


def _check_shard(root: Path, record: ShardRecord, advance: Advance) -> list[Problem]:
    try:
        there = dict(walk_inside(root, record.data))
    except DamagedError as error:
        return [Problem(kind="shard", place=record.name, file="", what=str(error))]
    except OSError as error:
        return [_unreadable(record, "", error)]
    problems = []
    for file in sorted({*there, *record.files}):
        try:
            what = _check_file(root, record, file, there.get(file), advance)
        except OSError as error:
            problems.append(_unreadable(record, file, error))
            continue
        if what is not None:
            problems.append(Problem(kind="shard", place=record.name, file=file, what=what))
    return problems


def _unreadable(record: ShardRecord, file: str, error: OSError) -> Problem:
    what = f"cannot be read ({error.strerror})"
    if not file:
        what = f"a folder in {record.data} {what}"
    return Problem(kind="unreadable", place=record.name, file=file, what=what)


def _check_file(
    root: Path, record: ShardRecord, file: str, there: Entry | None, advance: Advance
) -> str | None:
    stored = record.files.get(file)
    if stored is None:
        assert there is not None
        return f"is a {there.kind} that the record does not name"
    if there is None:
        return f"is missing, expected {stored.size} bytes"
    if there.kind != "file":
        return f"is a {there.kind}, expected a file of {stored.size} bytes"
    if there.size != stored.size:
        return f"is {there.size} bytes, expected {stored.size}"
    try:
        with os.fdopen(open_inside(root, f"{record.data}/{file}"), "rb", buffering=0) as opened:
            found = sha256_of(opened, advance)
    except FileNotFoundError:
        return f"vanished, expected {stored.size} bytes"
    except DamagedError as error:
        return f"cannot be read ({error})"
    if found != stored.sha256:
        return f"has sha256 {found[:12]}, expected {stored.sha256[:12]}"
    return None


def _opens(records: Mapping[str, ShardRecord], problems: Sequence[Problem]) -> bool:
    """Whether the cache can be opened: every record is whole, and they belong together."""
    return _bad_places(problems) <= set(records) and not any(p.kind == "cache" for p in problems)


def _bad_places(problems: Sequence[Problem]) -> set[str]:
    """Shards that anything is wrong with."""
    return {
        problem.place
        for problem in problems
        if problem.kind != "stray" and not problem.place.startswith(f"{PLANS}/")
    }


def _check_values(
    root: Path, records: Mapping[str, ShardRecord], known: Sequence[Problem], workers: int
) -> tuple[int, list[Problem]]:
    cache, bad = open_cache(root), _bad_places(known)
    whole = [record for name, record in records.items() if name not in bad]
    problems: list[Problem] = []
    total = sum(len(record.keys) for record in whole)
    with (
        progress("decode", "sample", total=total) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for found in pool.map(lambda record: _check_samples(cache, record, bar.update), whole):
            problems += found
    return total, problems


def _check_samples(cache: Cache, record: ShardRecord, advance: Advance) -> list[Problem]:
    problems = []
    for key in record.keys:
        kind: Literal["shard", "unreadable"] = "shard"
        try:
            what = wrong_value(cache.read(key))
        except CacheError as error:
            kind, what = _kind(error), str(error)
        if what is not None:
            what = f"sample {shown(key)}: {what}"
            problems.append(Problem(kind=kind, place=record.name, file="", what=what))
        advance(1)
    kind = "shard"
    try:
        whats = [*wrong_digests(ShardReader(root=cache.root, record=record))]
        for found in read_probe(cache.root, record):
            for name, (stored, computed) in compare_image(found, cache).items():
                key = shown(found.key)
                whats.append(f"sample {key}: {name}: {stored} stored, the probe's is {computed}")
    except CacheError as error:
        kind, whats = _kind(error), [str(error)]
    problems += [Problem(kind=kind, place=record.name, file="", what=what) for what in whats]
    return problems


def _kind(error: CacheError) -> Literal["shard", "unreadable"]:
    return "shard" if isinstance(error, DamagedError) else "unreadable"


def _count_leftovers(root: Path) -> int | None:
    try:
        return len(find_leftovers(root))
    except CacheError:
        return None


def _size(records: Collection[ShardRecord]) -> int:
    return sum(stored.size for record in records for stored in record.files.values())
