"""Flip single bits anywhere in a cache; see that verify finds each and reading never lies.

    python -m benchmarks.bit_flips --flips 1000

Each flip is in a file chosen by chance, records and plans included. After it, verify must find it,
and reading every sample, one by one and as the trainer's batches, must end in an error of ours or
give the values that were there before. Ends with 1 otherwise.
"""

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.malicious_caches import reference_cache
from cache_builder.verify import verify_cache
from shared.cache import open_cache
from shared.errors import ProjectError

OUTCOMES = ("found by verify", "read: error", "read: equal", "read: WRONG")


@click.command()
@click.option("--flips", default=1000, show_default=True, help="Bits to flip, one at a time.")
@click.option("--seed", default=0, show_default=True, help="Of the choices.")
def main(flips: int, seed: int) -> None:
    """Flip, verify, read."""
    with tempfile.TemporaryDirectory() as temporary:
        cache = reference_cache(Path(temporary))
        counts = flip_bits(cache, flips, seed)
    kinds = sorted({kind for kind, _ in counts})
    print(f"{'file':<22} {'flips':>6} " + " ".join(f"{name:>16}" for name in OUTCOMES))
    for kind in [*kinds, "all"]:
        row = [
            sum(n for (k, found), n in counts.items() if found == name and kind in (k, "all"))
            for name in ("flips", *OUTCOMES)
        ]
        print(f"{kind:<22} {row[0]:>6} " + " ".join(f"{number:>16}" for number in row[1:]))
    found = sum(n for (_, name), n in counts.items() if name == OUTCOMES[0])
    wrong = sum(n for (_, name), n in counts.items() if name == OUTCOMES[3])
    print(f"\n{flips} flips: verify finds {found}; silent wrong values: {wrong}")
    sys.exit(found != flips or wrong > 0)


def flip_bits(cache: Path, flips: int, seed: int) -> Counter[tuple[str, str]]:
    """(kind of file, what came of it) -> how often; the cache is whole again in the end."""
    chance = random.Random(seed)
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    before = read_everything(cache)
    counts: Counter[tuple[str, str]] = Counter()
    for _ in range(flips):
        path = chance.choice(files)
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        kind = kind_of(path.relative_to(cache))
        counts[kind, "flips"] += 1
        counts[kind, OUTCOMES[0]] += bool(verify_cache(cache, workers=1, decode=False).problems)
        counts[kind, outcome_of_reading(cache, before)] += 1
        path.write_bytes(content)
    return counts


def kind_of(path: Path) -> str:
    """What a file of a cache is, in a word."""
    match path.parts:
        case ("records" | "plans" as folder, *_):
            return folder
        case (*_, "zarr.json"):
            return "zarr.json"
        case _:
            return "chunks and indexes"


def outcome_of_reading(cache: Path, before: Mapping[str, Any]) -> str:
    """Each sample and batch is asked for by itself: one error does not hide a wrong value."""
    outcome = OUTCOMES[2]
    try:
        pieces = read_pieces(cache)
        while True:
            try:
                name, values = next(pieces)
            except ProjectError:
                return OUTCOMES[1] if outcome != OUTCOMES[3] else outcome
            if values is None:
                outcome = OUTCOMES[1] if outcome == OUTCOMES[2] else outcome
            elif not equal(values, before[name]):
                outcome = OUTCOMES[3]
    except StopIteration:
        return outcome


def read_everything(cache: Path) -> dict[str, Any]:
    """All that can be read of a whole cache."""
    return dict(read_pieces(cache))


def read_pieces(cache: Path) -> Iterator[tuple[str, Any]]:
    """(name, values) of each sample and batch; None where that is an error of ours."""
    opened = open_cache(cache)
    keys = opened.keys()
    yield "facts", (keys, opened.lengths, opened.with_image, dict(opened.identity))
    for key in keys:
        yield key, _or_none(lambda key=key: vars(opened.read(key)))
    for start in range(0, len(keys), 2):
        batch = keys[start : start + 2]
        yield f"batch {start}", _or_none(lambda batch=batch: vars(opened.read_batch(batch)))


def _or_none(read: Any) -> Any:
    try:
        return read()
    except ProjectError:
        return None


def equal(one: Any, other: Any) -> bool:
    """Equal in every bit, whatever arrays lie in."""
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and (
            (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        )
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


if __name__ == "__main__":
    main()
