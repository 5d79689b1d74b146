"""Several build-cache processes into one folder at once; the cache must be as from one.

    python -m benchmarks.concurrent_builds --rounds 20

Two and four processes, each with the same tars, or each with its own part of them. Every process
must end with 0; every sample must be there once and decode to the values of a cache that one
process built. `left` are data folders without a record: both of two equal shards were written.
Ends with 1 if a round differs.
"""

import json
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.kill_build import equal, samples_of
from shared.record import read_records
from tests.processes import arguments, start_build
from tests.support import FULL, sample, stored_digests, text_sample, write_tar


@click.command()
@click.option("--rounds", default=20, show_default=True, help="Of each kind.")
@click.option("--tars", default=8, show_default=True, help="Shards of a cache.")
def main(rounds: int, tars: int) -> None:
    """Build at once, compare."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = [
            write_tar(folder / "tars" / f"t-{n}.tar", sample(f"image-{n}"), text_sample(f"x-{n}"))
            for n in range(tars)
        ]
        (folder / "spec.yaml").write_text(json.dumps(FULL))
        alone = folder / "alone"
        assert _at_once(folder, alone, [data]) == [0]
        print(f"{'processes':>9} {'tars':>10} {'rounds':>7} {'as from one':>12} {'left':>5}")
        all_good = True
        for processes in (2, 4):
            for kind in ("same", "different"):
                parts = [data if kind == "same" else data[n::processes] for n in range(processes)]
                good = left = 0
                for number in range(rounds):
                    out = folder / f"{kind}-{processes}-{number}"
                    codes = _at_once(folder, out, parts)
                    good += not any(codes) and _as_from_one(out, alone)
                    left += len(list(out.glob("data/*"))) - len(read_records(out))
                all_good = all_good and good == rounds
                print(f"{processes:>9} {kind:>10} {rounds:>7} {good:>12} {left:>5}", flush=True)
    sys.exit(not all_good)


def _at_once(folder: Path, out: Path, parts: list[list[Path]]) -> list[int | None]:
    processes = [
        start_build(arguments(out, part, folder / "spec.yaml"), folder / f"log-{number}")
        for number, part in enumerate(parts)
    ]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _as_from_one(out: Path, alone: Path) -> bool:
    found, expected = samples_of(out), samples_of(alone)
    return (
        list(found) == list(expected)
        and all(equal(found[key], expected[key]) for key in expected)
        and stored_digests(out) == stored_digests(alone)
    )


if __name__ == "__main__":
    main()
