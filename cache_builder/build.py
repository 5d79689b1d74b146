"""Building a cache: for every tar without a record, read -> teacher -> encode -> commit.

The unit of work, of commit and of resume is one tar. A build may be killed at any moment and run
again; several builds may write to one folder.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cache_builder.features import (
    PreparedSample,
    compute_features,
    prepare,
    write_features,
)
from cache_builder.teacher import Teacher
from shared.errors import InputError
from shared.images import ImageProcessor
from shared.plan import plan_file
from shared.record import (
    FORMAT,
    ShardRecord,
    Skipped,
    TarFacts,
    compare,
    read_records,
    shard_name,
)
from shared.samples import TarIndex, index_tars, refuse_repeated_keys, tar_sha256
from shared.spec import CacheSpec
from shared.store import new_shard, put_file
from shared.tokenizer import Tokenizer, tokenizer_identity

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What one run of build-cache did."""

    built: int
    "Shards committed by this run."
    present: int
    "Shards that were there already."
    samples: int
    "Samples stored by this run."
    skipped: int
    "Samples of this run that could not be used."


@dataclass(kw_only=True)
class Builder:
    """Everything a build needs, loaded once."""

    spec: CacheSpec
    "What to store."
    teacher: Teacher
    "The loaded teacher."
    tokenizer: Tokenizer
    "The teacher's."
    processor: ImageProcessor
    "The teacher's tower's."
    batch_size: int
    "Samples per forward pass."
    identity: dict[str, Any] = field(init=False)
    "Goes into every record."

    def __post_init__(self) -> None:
        self.identity = {
            "spec": self.spec.to_dict(),
            "teacher": self.teacher.identity,
            "tokenizer": tokenizer_identity(self.tokenizer),
            "image_processor": self.processor.identity,
            "numerics": self.teacher.numerics,
        }


def build_cache(builder: Builder, tars: Sequence[Path], out: Path) -> BuildReport:
    """Build every shard that is not there yet.

    Raises:
        MismatchError: `out` holds shards of another spec, teacher, tokenizer or tar.
        InputError: tars that cannot be read, after all others have been built.
        CacheError: `out` cannot be written.
    """
    names = [shard_name(tar) for tar in tars]
    indexes, broken = index_tars(tars)
    pending = find_pending(builder.identity, indexes, out)
    write_plan(out, names)
    built = samples = skipped = 0
    total = sum(len(index.samples) + len(index.skipped) for index in pending)
    with (
        tqdm(total=total, unit="sample", desc="build", smoothing=0.05) as bar,
        logging_redirect_tqdm(),
    ):
        written = 0
        for index in pending:
            record = _build_shard(builder, index, out, bar.update)
            built, samples = built + 1, samples + len(record.keys)
            skipped += len(record.skipped)
            size = sum(file.size for file in record.files.values())
            written += size
            bar.set_postfix_str(_rate(written, bar.format_dict["elapsed"], skipped))
            log.info(
                "shard=%s samples=%d skipped=%d bytes=%d", record.name, len(record.keys),
                len(record.skipped), size,
            )  # fmt: skip
    if broken:
        raise InputError(
            f"{len(broken)} of {len(tars)} tars could not be read, the others are built: "
            + "; ".join(map(str, broken[:3]))
        )
    return BuildReport(
        built=built, present=len(indexes) - len(pending), samples=samples, skipped=skipped
    )


def find_pending(
    identity: Mapping[str, Any], indexes: Sequence[TarIndex], out: Path
) -> list[TarIndex]:
    """Tars without a record; those with one must have been built from the same things.

    Raises:
        MismatchError: names both values.
        InputError: a pending tar holds a sample that a shard of another tar holds already.
    """
    records = read_records(out)
    advice = "Build into another folder, or use what this cache was built with."
    for record in records.values():
        compare(f"{out}: shard {record.name}", record.identity, identity, advice)
    for index in tqdm(indexes, unit="tar", desc="check", delay=2):
        if index.name in records:
            there = vars(records[index.name].tar)
            compare(f"{out}: shard {index.name}: tar", there, vars(tar_facts(index)), advice)
    pending = [index for index in indexes if index.name not in records]
    stored = {key: record.tar.name for record in records.values() for key in record.keys}
    refuse_repeated_keys(pending, stored)
    return pending


def write_plan(out: Path, names: Sequence[str]) -> None:
    """Note which shards this run is to build, so that `info` can say how far the build is.

    A tar that cannot be read now is in it too. Runs with different tars write different files; the
    same run writes the same file again.
    """
    file, content = plan_file(names)
    if not (out / file).exists():
        put_file(out / file, content)


def tar_facts(index: TarIndex) -> TarFacts:
    """Name, size and digest of a tar."""
    return TarFacts(
        name=index.path.name, size=index.path.stat().st_size, sha256=tar_sha256(index.path)
    )


def _build_shard(
    builder: Builder, index: TarIndex, out: Path, advance: Callable[[int], object]
) -> ShardRecord:
    usable: list[PreparedSample] = []
    skipped: list[Skipped] = []
    for item in prepare(index, builder.spec, builder.tokenizer):
        if isinstance(item, Skipped):
            skipped.append(item)
            advance(1)
        else:
            usable.append(item)
    features = compute_features(
        usable, builder.teacher, builder.processor, builder.spec,
        batch_size=builder.batch_size, advance=advance,
    )  # fmt: skip
    skipped += features.skipped
    for sample in skipped:
        log.warning("shard=%s skipped=%s reason=%s", index.name, sample.key, sample.reason)
    with new_shard(
        out,
        index.name,
        format=FORMAT,
        identity=builder.identity,
        tar=tar_facts(index),
        keys=tuple(sample.key for sample in features.samples),
        lengths=tuple(sample.num_tokens for sample in features.samples),
        images=tuple(features.images),
        skipped=tuple(skipped),
    ) as shard:
        write_features(shard, features, builder.spec)
    assert shard.record is not None
    return shard.record


def _rate(written: int, elapsed: float, skipped: int) -> str:
    return f"{written / 1e6 / max(elapsed, 1e-9):.1f} MB/s, {skipped} skipped"
