"""Taking damaged shards out of a cache, and saying or doing what brings them back."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_builder.gc import remove
from cache_builder.tars import refuse_other_tars
from cache_builder.verify import Report
from shared.errors import CacheError, InputError
from shared.identity import compare
from shared.inside import list_inside
from shared.plan import plan_files, read_plan
from shared.progress import IMPORTING, announced
from shared.record import DATA, RECORDS, ShardRecord, record_names, shard_name, spec_of
from shared.samples import index_tars
from shared.spec import CacheSpec
from shared.tar_names import expand_tars

if TYPE_CHECKING:
    from cache_builder.build import Builder


@dataclass(frozen=True, kw_only=True)
class Rebuild:
    """What shards are to be built from again, and how. Made by `of`."""

    root: Path
    "The cache."
    spec: CacheSpec
    "As the cache was built."
    dtype: str
    "The teacher's number format, as the cache was built."
    tars: Mapping[str, Path]
    "Shard name -> tar, of all that are named."

    @classmethod
    def of(cls, root: Path, data: Sequence[str]) -> "Rebuild":
        """From the names of tars, as `build-cache` takes them.

        Raises:
            CacheError: no record says how to build.
            InputError: a tar cannot be found, or no shard may be called like it.
        """
        spec, dtype = spec_to_rebuild(root)
        tars = {shard_name(tar): tar for tar in expand_tars(data)}
        return cls(root=root, spec=spec, dtype=dtype, tars=tars)

    def choose(self, report: Report, wanted: Sequence[str], missing: Sequence[str]) -> list[Path]:
        """Tars of the damaged shards, and of planned ones that are missing.

        Args:
            wanted: by `tars_to_rebuild`, and `missing` by `missing_shards`.

        Raises:
            MismatchError: a tar is not the one that its shard was built from.
            InputError: one of a damaged shard is not named, or cannot be read.
        """
        chosen = choose_tars(wanted, list(self.tars.values()))
        chosen += [self.tars[name] for name in missing if name in self.tars]
        if chosen:
            check_tars(self.root, report, chosen)
        return chosen

    def load(
        self, report: Report, teacher: str, *, vision_tower: str | None, device: str | None
    ) -> "Builder":
        """What builds them.

        Raises:
            MismatchError: it is not what the cache was built with.
        """
        with announced(IMPORTING):
            from cache_builder.setup import load_builder

        builder = load_builder(
            self.spec, teacher, vision_tower=vision_tower, device=device, dtype=self.dtype,
            batch_size=None,
        )  # fmt: skip
        check_origin(self.root, report, builder.identity)
        return builder


def tars_to_rebuild(root: Path, report: Report) -> list[str]:
    """File names of the tars of all damaged shards, by their records while these are there.

    Args:
        report: what is wrong, by `verify_cache`.
    """
    records = [_record(root, name) for name in report.bad_shards]
    return [
        record.tar.name if record else f"{name}.tar"
        for name, record in zip(report.bad_shards, records, strict=True)
    ]


def missing_shards(root: Path) -> list[str]:
    """Planned shards without a record: never built, or taken out earlier."""
    planned: set[str] = set()
    for file in plan_files(root):
        with suppress(CacheError):  # the report names it
            planned |= set(read_plan(root, file))
    return sorted(planned - set(record_names(root)))


def take_out(root: Path, report: Report) -> None:
    """Remove the record, then the data, of every damaged shard, and damaged plans.

    Shards that are whole but do not belong together are left: which of them to keep is for people.
    So are records of other versions, and what cannot be read, which may be whole.

    Args:
        report: what is wrong, by `verify_cache`.

    Raises:
        CacheError: something cannot be deleted.
    """
    for problem in report.problems:
        if problem.kind == "plan":
            remove(root, problem.place)
    for name in report.bad_shards:
        _take_out_shard(root, name)


def check_origin(root: Path, report: Report, identity: Mapping[str, Any]) -> None:
    """Refuse to rebuild with what the cache was not built with, while it is still as it was.

    Args:
        report: what is wrong, by `verify_cache`.
        identity: of the build that is to be.

    Raises:
        MismatchError: both values are named.
        CacheError: a record stays that the build would stop at.
    """
    advice = "Nothing was taken out: name the teacher that built the cache."
    for name in record_names(root):
        if record := _record(root, name):
            compare(f"{root}: shard {name}", record.identity, identity, advice)
        elif name not in report.bad_shards:
            raise CacheError(
                f"{root}: the record of shard {name} cannot be read or is of another version, and "
                "a build reads all that stay. Nothing was taken out: mend it (cache-tools verify "
                "says why), or leave --teacher and --data out"
            )


def check_tars(root: Path, report: Report, tars: Sequence[Path]) -> None:
    """Refuse to rebuild from other tars than the shards were built from, while these are there.

    A shard whose record is damaged cannot say what it was built from.

    Args:
        report: what is wrong, by `verify_cache`.
        tars: those to build.

    Raises:
        MismatchError: both values are named.
        InputError: tars cannot be read, or one sample key stands in two of them.
    """
    try:
        indexes = index_tars(tars)
    except InputError as error:
        raise InputError(
            f"{error}. Nothing was taken out: mend them, or leave --teacher and --data out"
        ) from error
    records = {name: record for name in report.bad_shards if (record := _record(root, name))}
    advice = "Nothing was taken out: name the tar that the shard was built from."
    refuse_other_tars(records, indexes, root, advice)


def choose_tars(wanted: Sequence[str], tars: Sequence[Path]) -> list[Path]:
    """Those of `tars` that are to be built again.

    Raises:
        InputError: one is not among them.
    """
    by_name = {tar.name: tar for tar in tars}
    missing = [name for name in wanted if name not in by_name]
    if missing:
        raise InputError(
            f"{len(missing)} tars to rebuild are not in --data: {', '.join(missing[:3])}. Nothing "
            "was taken out: add them to --data, or leave --teacher and --data out"
        )
    return [by_name[name] for name in wanted]


def spec_to_rebuild(root: Path) -> tuple[CacheSpec, str]:
    """Spec and number format of a cache, from a record that can be read.

    Raises:
        CacheError: no record can.
    """
    for name in record_names(root):
        if record := _record(root, name):
            return spec_of(record), str(record.identity["numerics"]["dtype"])
    raise CacheError(
        f"{root}: no record is left that says how to build; run cache-tools repair without "
        "--teacher, then build-cache"
    )


def _take_out_shard(root: Path, name: str) -> None:
    record = _record(root, name)
    # Record first: a shard without one does not exist.
    remove(root, f"{RECORDS}/{name}.json")
    if record is None:
        return  # which folder it names is not known: that one is left over, for gc
    # Not through `data` if that is a link: list_inside refuses it.
    if any(f"{DATA}/{entry.name}" == record.data for entry in list_inside(root, DATA)):
        remove(root, record.data)


def _record(root: Path, name: str) -> ShardRecord | None:
    """None if it cannot be read."""
    try:
        return ShardRecord.load(root, name)
    except CacheError:
        return None
