"""Kill build-cache at random moments, continue it, and compare with a build that was left alone.

    python -m benchmarks.kill_build --kills 200

Each `build-cache` is a process of its own that runs the command's entry point (forked from a server
that has imported everything, so that a kill can fall into the work and not into the imports), gets
SIGKILL after a random time, and is started again until the cache is complete; then the next cache
is begun. After each kill every shard that has a record must read whole; a complete cache must hold
every sample once, and decode to the same values as one that was left alone. Prints one row per
cache and ends with 1 if anything was lost, doubled or changed.
"""

import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

from shared.cache import CachedSample, open_cache
from shared.errors import CacheError
from shared.record import read_records
from tests.processes import arguments, start_build
from tests.support import FULL, png, sample, text_sample, write_tar


@dataclass(kw_only=True)
class Tally:
    """What came of the builds of one cache."""

    kills: int = 0
    "Processes that SIGKILL ended."
    writing: int = 0
    "Of those, in the middle of writing a shard: its data lay there without a record."
    leftovers: int = 0
    "Data folders without a record."
    unreadable: int = 0
    "Kills after which a shard with a record did not read whole."
    lost: int = 0
    "Samples that the complete cache lacks."
    doubled: int = 0
    "Samples that two records hold."
    different: int = 0
    "Samples with any other value than in the cache that was left alone."
    shards: list[int] = field(default_factory=list)
    "Committed after each kill."

    @property
    def is_bad(self) -> bool:
        """Whether anything was lost, doubled or changed."""
        return bool(self.unreadable or self.lost or self.doubled or self.different)


@click.command()
@click.option("--kills", default=200, show_default=True, help="Processes to kill, in all.")
@click.option("--tars", default=24, show_default=True, help="Shards of a cache.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
def main(kills: int, tars: int, seed: int) -> None:
    """Kill, continue, compare."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = [_tar(folder, number) for number in range(tars)]
        (folder / "spec.yaml").write_text(json.dumps(FULL))
        _build(folder, folder / "first", data, None)  # the server starts
        begun = time.monotonic()
        assert _build(folder, folder / "alone", data, None) == 0
        seconds = time.monotonic() - begun
        alone = samples_of(folder / "alone")
        print(f"left alone: {tars} shards, {len(alone)} samples, {seconds:.1f} s")
        print(_HEADS.format(*_NAMES))
        tallies: list[Tally] = []
        while sum(tally.kills for tally in tallies) < kills:
            left = kills - sum(tally.kills for tally in tallies)
            out = folder / f"cache-{len(tallies)}"
            tally = _build_with_kills(folder, out, data, seconds, left, chance)
            _compare(out, alone, tally)
            tallies.append(tally)
            print(_row(str(len(tallies)), tally), flush=True)
    killed = sum(tally.kills for tally in tallies)
    good = sum(tally.kills for tally in tallies if not tally.is_bad)
    print(f"content as left alone after {good} of {killed} kills")
    sys.exit(good != killed)


_HEADS = "{:>5} {:>6} {:>8} {:>11} {:>5} {:>8} {:>10}  {}"
_NAMES = ("cache", "kills", "writing", "unreadable", "lost", "doubled", "different", "shards there")


def _row(name: str, tally: Tally) -> str:
    shards = " ".join(map(str, tally.shards))
    return _HEADS.format(
        name, tally.kills, tally.writing, tally.unreadable, tally.lost, tally.doubled,
        tally.different, shards,
    )  # fmt: skip


def _tar(folder: Path, number: int) -> Path:
    samples = [sample(f"image-{number}-{n}", image=png(2 * number + n)) for n in range(2)]
    return write_tar(folder / "tars" / f"t-{number:03d}.tar", *samples, text_sample(f"x-{number}"))


def _build(folder: Path, out: Path, data: list[Path], seconds: float | None) -> int:
    """Exit code of a build that is killed after `seconds`; negative if it was."""
    process = start_build(arguments(out, data, folder / "spec.yaml"), folder / "log")
    process.join(seconds)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _build_with_kills(
    folder: Path, out: Path, data: list[Path], seconds: float, most: int, chance: random.Random
) -> Tally:
    tally = Tally()
    while tally.kills < most:
        code = _build(folder, out, data, chance.uniform(0, 0.25 * seconds))
        if code == 0:
            return tally
        assert code == -9, (folder / "log").read_text()
        tally.kills += 1
        _look(out, tally)
    assert _build(folder, out, data, None) == 0, (folder / "log").read_text()
    return tally


def _look(out: Path, tally: Tally) -> None:
    """After a kill: what has a record must be whole."""
    records = read_records(out)
    tally.shards.append(len(records))
    leftovers = {path.name for path in out.glob("data/*")}
    leftovers -= {Path(record.data).name for record in records.values()}
    tally.writing += len(leftovers) > tally.leftovers
    tally.leftovers = len(leftovers)
    if records:
        try:
            samples_of(out)
        except CacheError:
            tally.unreadable += 1


def _compare(out: Path, alone: dict[str, CachedSample], tally: Tally) -> None:
    keys = Counter(key for record in read_records(out).values() for key in record.keys)
    tally.lost = len(set(alone) - set(keys))
    tally.doubled = sum(number - 1 for number in keys.values())
    found = samples_of(out)
    tally.different = sum(not equal(found[key], alone[key]) for key in alone if key in found)


def samples_of(out: Path) -> dict[str, CachedSample]:
    """Every sample of a cache, decoded."""
    cache = open_cache(out)
    return {key: cache.read(key) for key in cache.keys()}  # noqa: SIM118  (a Cache is no dict)


def equal(one: object, other: object) -> bool:
    """Whether two samples hold the same values, bit by bit."""
    if isinstance(one, CachedSample):
        return all(equal(value, vars(other)[name]) for name, value in vars(one).items())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one == other


if __name__ == "__main__":
    main()
