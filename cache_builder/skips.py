"""How many samples a build may lose: `--max-skipped`.

The limit is a count, or a share of all samples in --data, rounded up: one bad sample of ten does
not stop a build, two do. What earlier runs skipped in the same tars counts too, so neither the
order of the tars nor killing and continuing changes whether a build stops.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from shared.errors import ConfigError, InputError
from shared.record import ShardRecord, Skipped
from shared.samples import TarIndex, skipped_by_headers


@dataclass(frozen=True, kw_only=True)
class SkipLimit:
    """A count or a share."""

    text: str
    "As the user wrote it."
    share: Fraction | None = None
    "Of all samples in --data; None if it is a count."
    count: int = 0
    "Samples, if it is no share."

    @classmethod
    def parse(cls, text: str) -> "SkipLimit":
        """From `1%`, `0.5%` or `20`.

        Raises:
            ConfigError: neither a share up to 100% nor a count.
        """
        found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?%|([0-9]{1,18})", text.strip())
        if found is None or (found[1] and Fraction(found[1]) > 100):
            raise ConfigError(
                f"--max-skipped {text!r}: expected a share as '1%' or a count as '20'"
            )
        if found[1]:
            return cls(text=text, share=Fraction(found[1]) / 100)
        return cls(text=text, count=int(found[2]))

    def allowed(self, samples: int) -> int:
        """How many of so many samples may be skipped."""
        return self.count if self.share is None else math.ceil(self.share * samples)


@dataclass(kw_only=True)
class SkipBudget:
    """What may still be skipped of the tars of one build."""

    limit: SkipLimit
    "What the user allows."
    samples: int
    "All samples in --data."
    skipped: list[Skipped] = field(default_factory=list)
    "Of the shards that are committed or about to be."

    @classmethod
    def of(
        cls, limit: SkipLimit, indexes: Sequence[TarIndex], records: Mapping[str, ShardRecord]
    ) -> "SkipBudget":
        """What earlier runs left of the limit.

        Raises:
            InputError: less than the tars' headers tell already.
        """
        samples = sum(index.num_samples for index in indexes)
        budget = cls(limit=limit, samples=samples, skipped=skipped_before(indexes, records))
        pending = [index for index in indexes if index.name not in records]
        budget._refuse_above_limit([*budget.skipped, *skipped_by_headers(pending)])
        return budget

    def spend(self, skipped: Sequence[Skipped]) -> None:
        """Note what a shard lacks, before it is committed.

        Raises:
            InputError: that is more than the limit; says what is wrong with them and what to do.
        """
        self.skipped += skipped
        self._refuse_above_limit(self.skipped)

    def _refuse_above_limit(self, skipped: Sequence[Skipped]) -> None:
        allowed = self.limit.allowed(self.samples)
        if len(skipped) > allowed:
            raise InputError(
                f"{len(skipped)} of {self.samples} samples cannot be used so far, --max-skipped "
                f"{self.limit.text} allows {allowed}: {'; '.join(frequent_reasons(skipped))}. "
                "Shards that are built stay: go on with a larger --max-skipped, or correct "
                "these samples where they stand (a sample taken out of the JSON moves all that "
                "follow it to other places, and other tars need other shards)"
            )


def skipped_before(
    indexes: Sequence[TarIndex], records: Mapping[str, ShardRecord]
) -> list[Skipped]:
    """Of the tars whose shard is there, what it lacks."""
    done = [records[index.name] for index in indexes if index.name in records]
    return [skipped for record in done for skipped in record.skipped]


def frequent_reasons(skipped: Sequence[Skipped], most: int = 3) -> list[str]:
    """The most frequent reasons with their count and a few keys; numbers in a reason differ from
    sample to sample and are not told apart.
    """
    groups: dict[str, list[Skipped]] = {}
    for sample in skipped:
        groups.setdefault(re.sub(r"\d+", "0", sample.reason), []).append(sample)
    ordered = sorted(groups.values(), key=len, reverse=True)
    shown = [
        f"{len(group)} x {group[0].reason} ({_examples([sample.key for sample in group])})"
        for group in ordered[:most]
    ]
    others = sum(len(group) for group in ordered[most:])
    return shown + ([f"{others} x other reasons"] if others else [])


def _examples(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
