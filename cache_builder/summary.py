"""What a cache is and how far its build is, from its records alone."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.plan import plan_files, read_plan
from shared.record import no_cache, read_records, sizes_by_array, spec_of

_SIGNALS = {
    "attention": "attention",
    "query_offsets": "attention",
    "vision_tokens": "vision tokens",
    "top_": "log-probabilities",
    "rest_": "log-probabilities",
    "response_offsets": "log-probabilities",
    "probe_": "probe",
    "image_sha256": "image digests",
}
"Array prefix -> the signal that it belongs to; everything else is the sequence."


@dataclass(frozen=True, kw_only=True)
class SkippedSample:
    """A sample that could not be used."""

    key: str
    "WebDataset key."
    shard: str
    "Named as its tar, without `.tar`."
    reason: str
    "Why."


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A cache at a glance."""

    shards: int
    "Committed shards."
    planned: int
    "Shards that the builds so far were to make."
    samples: int
    "Stored samples."
    images: int
    "Distinct images, counted per shard."
    skipped: int
    "Samples that could not be used."
    skip_reasons: dict[str, int]
    "Reason -> samples."
    skipped_samples: tuple[SkippedSample, ...]
    "Each of them, in the order of shards."
    sizes: dict[str, int]
    "Signal -> bytes on disk."
    identity: dict[str, Any]
    "What the cache was built with; empty if nothing is committed yet."
    misfits: tuple[str, ...]
    "Shards that were built with something else than the first one, whose identity this is."
    pending: tuple[str, ...]
    "Planned shards that are not committed."

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(self.sizes.values())


def summarise(root: Path) -> Summary:
    """Read records and plans.

    Raises:
        CacheError: no cache and no begun build here.
        DamagedError: a record or plan cannot be read.
    """
    records = read_records(root)
    planned = {name for file in plan_files(root) for name in read_plan(root, file)}
    if not records and not planned:
        raise no_cache(root, "records or plans")
    first = next(iter(records.values()), None)
    skipped = tuple(
        SkippedSample(key=sample.key, shard=name, reason=sample.reason)
        for name, record in records.items()
        for sample in record.skipped
    )
    reasons = Counter(sample.reason for sample in skipped)
    sizes: Counter[str] = Counter()
    for array, size in sizes_by_array(list(records.values())).items():
        sizes[_signal(array)] += size
    return Summary(
        shards=len(records),
        planned=len(planned | set(records)),
        samples=sum(len(record.keys) for record in records.values()),
        images=sum(max(record.images, default=-1) + 1 for record in records.values()),
        skipped=len(skipped),
        skip_reasons=dict(reasons.most_common()),
        skipped_samples=skipped,
        sizes=dict(sizes.most_common()),
        identity={**first.identity, "spec": spec_of(first).to_dict()} if first else {},
        misfits=tuple(
            name for name, record in records.items() if first and record.identity != first.identity
        ),
        pending=tuple(sorted(planned - set(records))),
    )


def _signal(array: str) -> str:
    for prefix, signal in _SIGNALS.items():
        if array.startswith(prefix):
            return signal
    return "sequence"
