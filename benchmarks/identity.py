"""Change one thing at a time that a cache is made from, and say where it is noticed.

    python -m benchmarks.identity

The table of tests/identity.py, printed: what a continued build, a training run and a merge by
copying said to each change. Ends with 1 if a change was accepted that must be refused, or the
other way round.
"""

import contextlib
import dataclasses
import io
import sys
import tempfile
from pathlib import Path

import click
from accelerate.state import AcceleratorState

from tests.identity import (
    CASES,
    NOT_THERE,
    Case,
    continue_build,
    first_world,
    merge,
    start_training,
)

PLACES = {"build": continue_build, "train": start_training, "merge": merge}


@click.command()
def main() -> None:
    """Change, try, print."""
    with tempfile.TemporaryDirectory() as temporary:
        first = first_world(Path(temporary) / "first")
        print(f"{'change':<28} {'build continued':<16} {'training':<16} {'merge':<16}")
        wrong = 0
        for number, case in enumerate(CASES):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            changed = case.change(dataclasses.replace(first, folder=folder))
            cells = []
            for place, meet in PLACES.items():
                AcceleratorState._reset_state(reset_partial_state=True)
                with contextlib.redirect_stderr(io.StringIO()):
                    found = NOT_THERE if _expected(case, place) == NOT_THERE else meet(changed)
                right = (_expected(case, place) or "accepted") in found
                wrong += not right
                shown = found if found in ("accepted", NOT_THERE) else "refused"
                cells.append(shown if right else f"WRONG: {shown}")
            print(f"{case.name:<28} " + " ".join(f"{cell:<16}" for cell in cells), flush=True)
    print(f"wrong: {wrong}")
    sys.exit(bool(wrong))


def _expected(case: Case, place: str) -> str | None:
    expected: str | None = getattr(case, place)
    return expected


if __name__ == "__main__":
    main()
