"""The commands of `cache-tools` that look after caches: verify, repair, gc, diff.

Imports are inside the commands, so that `--help` needs neither torch nor zarr.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shared.console import (
    AS_JSON,
    DEVICE,
    FOLDER,
    VISION_TOWER,
    Command,
    bytes_text,
    only_with,
    printable_lines,
)
from shared.errors import CacheError, DamagedError

if TYPE_CHECKING:
    from cache_builder.build import Builder
    from cache_builder.diff import CacheDiff, ShardDiff
    from cache_builder.gc import Leftover
    from cache_builder.verify import Report

_WORKERS = click.option(
    "--workers", default=min(8, len(os.sched_getaffinity(0))), show_default="CPUs, at most 8",
    type=click.IntRange(min=1), help="Shards checked at the same time.",
)  # fmt: skip
_DECODE = click.option(
    "--decode", is_flag=True,
    help="Also read every sample: finite values, probabilities up to 1, ids of the vocabulary.",
)  # fmt: skip

_MEND = (
    "mend permissions or the disk and run the same command again (to give a shard up, delete its "
    "record)"
)


@click.command(cls=Command)
@click.argument("cache", type=FOLDER)
@_WORKERS
@_DECODE
@click.option(
    "--teacher",
    help="Compute the targets of each shard's probe again with this teacher, folder or hub id.",
)
@VISION_TOWER
@DEVICE
@AS_JSON
def verify(
    cache: Path, workers: int, decode: bool, teacher: str | None, vision_tower: str | None,
    device: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare every byte of CACHE with its records.

    Names all that is missing or changed, what lies in a shard's folder in excess, and links in the
    cache's own folders; ends with 1 if there is any.
    """
    only_with("--teacher", teacher is not None, vision_tower=vision_tower, device=device)
    from cache_builder.verify import verify_cache, verify_targets

    report = verify_cache(cache, workers=workers, decode=decode)
    if teacher is not None:
        report = verify_targets(cache, report, teacher, vision_tower=vision_tower, device=device)
    if as_json:
        values = {**dataclasses.asdict(report), "bad_shards": report.bad_shards}
        click.echo(json.dumps(values, indent=1))
    else:
        click.echo(printable_lines(_report_lines(cache, report)))
    if report.problems:
        raise DamagedError(_verdict(cache, report))


@click.command(cls=Command)
@click.argument("cache", type=FOLDER)
@_WORKERS
@_DECODE
@click.option("--teacher", help="Rebuild with this teacher, folder or hub id; needs --data.")
@VISION_TOWER
@click.option("--data", multiple=True, help="Tars to rebuild from, as for build-cache. Repeatable.")
@DEVICE
def repair(
    cache: Path, workers: int, decode: bool, teacher: str | None, vision_tower: str | None,
    data: tuple[str, ...], device: str | None,
) -> None:  # fmt: skip
    """Take damaged shards out of CACHE and say which tars to build again.

    With --teacher and --data they are built again at once, with the spec and number format of the
    cache, and so are planned shards that are missing; another teacher or tar is refused before
    anything is taken out. Shards that are whole but do not belong together are named and left,
    and so is what cannot be read.
    """
    from cache_builder.repair import Rebuild, missing_shards, take_out, tars_to_rebuild
    from cache_builder.verify import verify_cache

    if bool(teacher) != bool(data):
        raise click.UsageError("--teacher and --data go together")
    only_with("--teacher", teacher is not None, vision_tower=vision_tower, device=device)
    # What would be in the way later is found before every byte is read.
    rebuild = Rebuild.of(cache, data) if teacher else None
    report = verify_cache(cache, workers=workers, decode=decode)
    wanted, missing = tars_to_rebuild(cache, report), missing_shards(cache)
    chosen = rebuild.choose(report, wanted, missing) if rebuild else []
    # And what is refused is refused before anything is taken out.
    builder = (
        rebuild.load(report, teacher, vision_tower=vision_tower, device=device)
        if rebuild and teacher and chosen
        else None
    )
    take_out(cache, report)
    lines = [f"{problem}" for problem in report.problems]
    lines.append(
        f"{cache}: {len(wanted)} shards taken out"
        + (f"; build again: {' '.join(wanted)}" if wanted else "")
    )
    click.echo(printable_lines(lines))
    if builder:
        click.echo(_build_chosen(builder, chosen, cache))
    if left := [name for name in missing if not (rebuild and name in rebuild.tars)]:
        click.echo(printable_lines([_missing_line(cache, left)]))
    _refuse_what_is_left(cache, report)


def _build_chosen(builder: "Builder", tars: Sequence[Path], cache: Path) -> str:
    """What came of it."""
    from cache_builder.build import build_cache
    from shared.stopping import AGAIN, Stopped, stop_on_sigterm

    try:
        with stop_on_sigterm() as stop:
            built = build_cache(builder, tars, cache, stop=stop)
    except Stopped:
        return f"{cache}: stopped by SIGTERM before a shard was built; {AGAIN}"
    return (
        f"{cache}: {built.built} shards built, {built.samples} samples stored, "
        f"{built.skipped} skipped{built.stopped}"
    )


def _missing_line(cache: Path, missing: Sequence[str]) -> str:
    tars = ", ".join(f"{name}.tar" for name in missing[:3])
    return (
        f"{cache}: {len(missing)} planned shards have no record; build-cache builds them from "
        f"their tars: {tars}{', ...' if len(missing) > 3 else ''}"
    )


def _refuse_what_is_left(cache: Path, report: "Report") -> None:
    parts = []
    if report.unreadable:
        parts.append(f"{_unreadable(report)}, and are left as they are: {_MEND}")
    if report.beyond_repair:
        parts.append(_beyond_repair(report))
    if parts:
        raise CacheError(f"{cache}: {'; '.join(parts)}")


def _beyond_repair(report: "Report") -> str:
    problems = report.beyond_repair
    return (
        f"{len(problems)} problems that taking shards out does not solve, the first: {problems[0]}"
    )


def _unreadable(report: "Report") -> str:
    return (
        f"{len(report.unreadable)} shards or plans cannot be read: {_first_five(report.unreadable)}"
    )


@click.command(cls=Command)
@click.argument("cache", type=FOLDER)
# A shard's data is written in seconds to minutes; the rest of a day is for clocks that differ.
@click.option(
    "--older-than", default=24.0, show_default=True, type=click.FloatRange(min=0), metavar="HOURS",
    help="Spare what changed within so many hours: a build that runs now may be writing it. Less "
    "is safe if you know that none does.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@AS_JSON
def gc(cache: Path, older_than: float, dry_run: bool, as_json: bool) -> None:
    """Delete what killed builds left in CACHE.

    Data folders that no record names and half-written files; readers never look at them. Links and
    anything that a build does not make are left alone.
    """
    if math.isnan(older_than):  # which click takes for a number beyond 0
        raise click.UsageError("--older-than nan: expected hours")
    from cache_builder.gc import sweep

    old, young = sweep(cache, older_than=3600 * older_than, dry_run=dry_run)
    if as_json:
        found = {"deleted": [*map(vars, old)], "spared": [*map(vars, young)]}
        click.echo(json.dumps(found, indent=1))
        return
    verb = "would delete" if dry_run else "deleted"
    lines = [*_leftover_lines(verb, old), *_leftover_lines("spared", young)]
    spared = f", {len(young)} spared: younger than {older_than:g} hours" if young else ""
    size = bytes_text(sum(leftover.size for leftover in old))
    click.echo(printable_lines([*lines, f"{cache}: {verb} {len(old)} leftovers, {size}{spared}"]))


@click.command(cls=Command)
@click.argument("a", type=FOLDER)
@click.argument("b", type=FOLDER)
@AS_JSON
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Say what differs between the caches A and B.

    Compares records, not data: identity, shards, samples, what was skipped, digests of arrays. Ends
    with 1 if anything differs.
    """
    import msgspec

    from cache_builder.diff import diff_caches

    found = diff_caches(a, b)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
    else:
        click.echo(printable_lines(_diff_lines(found)))
    if found:
        click.get_current_context().exit(1)


def _report_lines(cache: Path, report: "Report") -> Iterator[str]:
    yield from map(str, report.problems)
    decoded = f", {report.samples} samples decoded" if report.samples else ""
    if report.recomputed:
        decoded += f", {report.recomputed} of the probe computed again"
    yield (
        f"{cache}: {report.shards} shards, {report.files} files, {bytes_text(report.size)}{decoded}"
        f": {f'{len(report.problems)} problems' if report.problems else 'all good'}"
    )
    if report.unchecked:
        yield f"{' and '.join(report.unchecked)} not checked: the cache cannot be opened as a whole"
    if report.pending:
        yield f"{report.pending} planned shards are not built yet (cache-tools info {cache})"
    if report.leftovers:
        yield f"{report.leftovers} leftovers that no record names (cache-tools gc {cache})"


def _verdict(cache: Path, report: "Report") -> str:
    bad = report.bad_shards
    plans = [problem.place for problem in report.problems if problem.kind == "plan"]
    off = sorted({problem.place for problem in report.problems if problem.kind == "targets"})
    parts = []
    if bad:
        parts.append(f"{len(bad)} of {report.shards} shards are damaged: {_first_five(bad)}")
    if plans:
        parts.append(f"{len(plans)} plans are damaged: {_first_five(plans)}")
    if bad or plans:
        repair = f"cache-tools repair {cache}"
        parts.append(f"{repair} takes out what is damaged and says what to build again")
    if report.beyond_repair:
        parts.append(_beyond_repair(report))
    if report.unreadable:
        parts.append(f"{_unreadable(report)}; {_MEND}")
    if off:
        parts.append(
            f"{len(off)} shards hold other values than this teacher gives: {_first_five(off)}; "
            f"delete {cache}/records/<shard>.json of each and run build-cache on its tar"
        )
    return f"{cache}: {'; '.join(parts)}"


def _first_five(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


def _leftover_lines(verb: str, leftovers: "Sequence[Leftover]") -> Iterator[str]:
    for leftover in leftovers:
        hours = leftover.age / 3600
        yield f"{verb} {leftover.path}  {bytes_text(leftover.size)}, {hours:.1f} hours old"


def _diff_lines(found: "CacheDiff") -> Iterator[str]:
    yield from _identity_lines(found.identity)
    for side, names in (("A", found.shards_only_in_a), ("B", found.shards_only_in_b)):
        yield from (f"shard     {name}: only in {side}" for name in names)
    for name, shard in found.shards.items():
        yield from (f"shard     {name}: {line}" for line in _shard_lines(shard))
    yield f"{found.equal} shards are equal, {len(found.shards)} differ"


def _identity_lines(pairs: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    for path, (ours, theirs) in pairs.items():
        yield f"identity  {path}: {json.dumps(ours)} in A, {json.dumps(theirs)} in B"


def _shard_lines(shard: "ShardDiff") -> Iterator[str]:
    yield from _identity_lines(shard.identity)
    for field, (ours, theirs) in shard.tar.items():
        yield f"tar {field}: {ours} in A, {theirs} in B"
    for side, keys in (("A", shard.keys_only_in_a), ("B", shard.keys_only_in_b)):
        if keys:
            yield f"{len(keys)} samples only in {side}: {', '.join(keys[:3])}"
    if shard.samples:
        yield (
            f"{len(shard.samples)} samples have another row, image or length: "
            f"{', '.join([*shard.samples][:3])}"
        )
    if shard.skipped:
        yield f"{len(shard.skipped)} samples skipped otherwise: {', '.join([*shard.skipped][:3])}"
    for key, (ours, theirs) in shard.probe.items():
        yield f"probe {key}: {_short(ours)} in A, {_short(theirs)} in B"
    for array, (ours, theirs) in shard.arrays.items():
        yield f"{array}: {_short(ours)} in A, {_short(theirs)} in B"


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
