"""Taking damaged shards out of a cache, and saying or doing what brings them back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_builder.gc import remove
from cache_builder.verify import Report
from shared.errors import CacheError, InputError
from shared.inside import list_inside
from shared.record import DATA, RECORDS, ShardRecord, compare, record_names, spec_of
from shared.spec import CacheSpec


def take_out(root: Path, report: Report) -> list[str]:
    """Remove the record, then the data, of every damaged shard, and damaged plans.

    Shards that are whole but do not belong together are left: which of them to keep is for people.
    So are records of other versions.

    Args:
        report: what is wrong, by `verify_cache`.

    Returns:
        File names of the tars to build again.

    Raises:
        CacheError: something cannot be deleted.
    """
    for problem in report.problems:
        if problem.kind == "plan":
            remove(root, problem.place)
    return [_take_out_shard(root, name) for name in report.bad_shards]


def check_origin(root: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to rebuild with what the cache was not built with, while it is still as it was.

    Args:
        identity: of the build that is to be.

    Raises:
        MismatchError: both values are named.
    """
    for name in record_names(root):
        try:
            record = ShardRecord.load(root / RECORDS / f"{name}.json")
        except CacheError:
            continue
        advice = "Nothing was taken out: name the teacher that built the cache."
        compare(f"{root}: shard {name}", record.identity, identity, advice)


def choose_tars(wanted: Sequence[str], tars: Sequence[Path]) -> list[Path]:
    """Those of `tars` that are to be built again.

    Raises:
        InputError: one is not among them.
    """
    by_name = {tar.name: tar for tar in tars}
    missing = [name for name in wanted if name not in by_name]
    if missing:
        raise InputError(
            f"{len(missing)} tars to rebuild are not in --data: {', '.join(missing[:3])}; the "
            "damaged shards are out of the cache, run build-cache with these tars"
        )
    return [by_name[name] for name in wanted]


def spec_to_rebuild(root: Path) -> tuple[CacheSpec, str]:
    """Spec and number format of a cache, from a record that can be read.

    Raises:
        CacheError: no record can.
    """
    for name in record_names(root):
        try:
            record = ShardRecord.load(root / RECORDS / f"{name}.json")
            return spec_of(record), str(record.identity["numerics"]["dtype"])
        except CacheError:
            continue
    raise CacheError(
        f"{root}: no record is left that says how to build; run cache-tools repair without "
        "--teacher, then build-cache"
    )


def _take_out_shard(root: Path, name: str) -> str:
    """The tar to build again. Record first: a shard without one does not exist."""
    tar, data = f"{name}.tar", None
    try:
        record = ShardRecord.load(root / RECORDS / f"{name}.json")
        tar, data = record.tar.name, record.data
    except CacheError:
        pass  # which folder it names is not known: that one is left over, for gc
    remove(root, f"{RECORDS}/{name}.json")
    # Not through `data` if that is a link: list_inside refuses it.
    if data is not None and any(f"{DATA}/{e.name}" == data for e in list_inside(root, DATA)):
        remove(root, data)
    return tar
