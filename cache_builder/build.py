"""Building a cache: for every tar without a record, read -> teacher -> encode -> commit.

The unit of work, of commit and of resume is one tar. A build may be killed at any moment and run
again; several builds may write to one folder.

The stages overlap, so that the slowest sets the pace: while the teacher runs on one tar, threads
read the next one and decode the coming images, and another writes the shard before. Each is at
most one tar ahead or behind, so memory is bounded by the size of a shard, not by their number.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Never

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cache_builder.ahead import Ahead
from cache_builder.committed import Committed
from cache_builder.features import ShardFeatures, compute_features, write_features
from cache_builder.prepare import PreparedTar, TarReader
from cache_builder.probe import make_probe, write_probe
from cache_builder.skips import SkipBudget, SkipLimit
from cache_builder.tars import find_pending, tar_facts
from cache_builder.teacher import Teacher
from shared.durable import put_file
from shared.errors import CacheError, ConfigError, InputError
from shared.images import ImageProcessor
from shared.memory import fitting
from shared.plan import plan_file
from shared.record import FORMAT, ProbeSample, ShardRecord, shard_name
from shared.samples import TarIndex, first_of, index_readable_tars
from shared.spec import CacheSpec
from shared.stopping import AGAIN, Stopped, StopRequest
from shared.store import new_shard
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
    left: int
    "Shards still to build, because the run was asked to stop."

    @property
    def stopped(self) -> str:
        """What to add of a run that was asked to stop; empty if it was not."""
        return f"; stopped by SIGTERM with {self.left} shards left: {AGAIN}" if self.left else ""


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

    def reader(self) -> TarReader:
        """Reads tars for this teacher."""
        return TarReader(
            self.spec, self.tokenizer, self.processor, batch_size=self.batch_size,
            pin=self.teacher.device.type == "cuda",
        )  # fmt: skip


def build_cache(
    builder: Builder,
    tars: Sequence[Path],
    out: Path,
    *,
    max_skipped: SkipLimit | None = None,
    stop: StopRequest | None = None,
) -> BuildReport:
    """Build every shard that is not there yet.

    Args:
        max_skipped: how many samples may be lost; None for any number.
        stop: looked at between batches; the shard in work is dropped, those before it stay.

    Raises:
        MismatchError: `out` holds shards of another spec, teacher, tokenizer or tar.
        ConfigError: a batch needs more memory than the device has.
        InputError: tars that cannot be read, after all others have been built; or more samples
            that cannot be used than `max_skipped`: the shard that crosses it is not committed.
        CacheError: `out` cannot be written.
    """
    stop = stop or StopRequest()
    names = [shard_name(tar) for tar in tars]
    indexes, broken = index_readable_tars(tars)
    committed = Committed(out, builder.identity)
    pending = find_pending(committed.records, indexes, out)
    limit = max_skipped or SkipLimit.parse("100%")
    budget = SkipBudget.of(limit, indexes, committed.records)
    write_plan(out, names)
    stop.is_watched = True
    total = sum(index.num_samples for index in pending)
    with (
        tqdm(total=total, unit="sample", desc="build", smoothing=0.05) as bar,
        logging_redirect_tqdm(),
    ):
        run = _Run(bar=bar, builder=builder, out=out, committed=committed, budget=budget, stop=stop)
        run.build(pending)
    if broken and not stop.requested:
        raise InputError(
            f"{len(broken)} of {len(tars)} tars could not be read"
            f"{', the others are built' if indexes else ''}: {first_of(broken)}"
        )
    return BuildReport(
        built=run.built,
        present=len(indexes) - len(pending) + run.taken,
        samples=run.samples,
        skipped=run.skipped,
        left=len(pending) - run.built - run.taken,
    )


def write_plan(out: Path, names: Sequence[str]) -> None:
    """Note which shards this run is to build, so that `info` can say how far the build is.

    A tar that cannot be read now is in it too. Runs with different tars write different files; the
    same run writes the same file again.
    """
    file, content = plan_file(names)
    if not (out / file).exists():
        put_file(out / file, content, CacheError)


def commit_shard(
    builder: Builder, index: TarIndex, features: ShardFeatures, out: Path
) -> ShardRecord:
    """Write a tar's features as a shard.

    Raises:
        CacheError: the cache cannot be written.
        InputError: the tar cannot be read any more.
    """
    probe = make_probe(index, features.samples, builder.processor)
    with new_shard(
        out,
        index.name,
        format=FORMAT,
        identity=builder.identity,
        tar=tar_facts(index),
        keys=tuple(sample.key for sample in features.samples),
        lengths=tuple(sample.num_tokens for sample in features.samples),
        images=tuple(features.images),
        skipped=tuple(features.skipped),
        probe=tuple(ProbeSample(key=p.key, pixels_sha256=p.pixels_sha256) for p in probe),
    ) as shard:
        write_features(shard, features, builder.spec)
        write_probe(shard, probe)
    assert shard.record is not None
    return shard.record


@dataclass(kw_only=True)
class _Run:
    """The shards of one run on their way, and what has come of it."""

    bar: "tqdm[Never]"
    builder: Builder
    out: Path
    committed: Committed
    budget: SkipBudget
    stop: StopRequest
    built: int = 0
    taken: int = 0
    "Shards that another build committed first."
    samples: int = 0
    skipped: int = 0
    size: int = 0
    "Bytes written."

    def build(self, pending: Sequence[TarIndex]) -> None:
        """Run the teacher on one tar after another; each is written while the next one runs."""
        commit: Future[ShardRecord] | None = None
        with _prepared(self.builder, pending) as tars, ThreadPoolExecutor(1, "write") as writer:
            for tar in tars:
                if self._is_taken(tar.index):
                    continue
                try:
                    features = self._compute(tar)
                except Stopped:
                    break
                self._finish(commit)
                commit = writer.submit(commit_shard, self.builder, tar.index, features, self.out)
                del tar, features  # the writer's now: gone as soon as they are written
            self._finish(commit)

    def _is_taken(self, index: TarIndex) -> bool:
        self.committed.refresh()
        if index.name not in self.committed.records:
            return False
        self.taken += 1
        self.bar.update(index.num_samples)
        self.budget.spend(self.committed.records[index.name].skipped)
        return True

    def _compute(self, tar: PreparedTar) -> ShardFeatures:
        self.stop.check()
        with fitting(
            f"{tar.index.path}: batches of {self.builder.batch_size} need",
            self.builder.teacher.device,
            "what is committed stays, go on with build-cache and a smaller --batch-size",
            ConfigError,
        ):  # fmt: skip
            features = compute_features(
                tar, self.builder.teacher, self.builder.spec, advance=self._advance
            )
        for sample in features.skipped:
            log.warning("shard=%s skipped=%s reason=%s", tar.index.name, sample.key, sample.reason)
        self.budget.spend(features.skipped)
        return features

    def _advance(self, done: int) -> None:
        self.bar.update(done)
        self.stop.check()

    def _finish(self, commit: Future[ShardRecord] | None) -> None:
        if commit is None:
            return
        record = commit.result()
        size = sum(file.size for file in record.files.values())
        self.built += 1
        self.samples += len(record.keys)
        self.skipped += len(record.skipped)
        self.size += size
        rate = self.size / 1e6 / max(self.bar.format_dict["elapsed"], 1e-9)
        self.bar.set_postfix_str(f"{rate:.1f} MB/s, {self.skipped} skipped")
        log.info(
            "shard=%s samples=%d skipped=%d bytes=%d", record.name, len(record.keys),
            len(record.skipped), size,
        )  # fmt: skip


@contextmanager
def _prepared(builder: Builder, pending: Sequence[TarIndex]) -> Iterator[Iterator[PreparedTar]]:
    """The tars in order, each read while the one before is in work."""
    pool = ThreadPoolExecutor(1, "read")
    with builder.reader() as reader:
        try:
            yield Ahead(reader, pending, pool, depth=1)
        finally:
            pool.shutdown(cancel_futures=True)
