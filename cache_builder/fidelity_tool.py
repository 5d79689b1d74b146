"""The command `cache-tools fidelity`.

Imports are inside the command, so that `--help` needs neither torch nor zarr.
"""

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shared.console import (
    AS_JSON,
    DEVICE,
    FOLDER,
    VISION_TOWER,
    Command,
    only_with,
    printable_lines,
)
from shared.progress import IMPORTING, announced

if TYPE_CHECKING:
    from cache_builder.fidelity import CacheFidelity


@click.command(cls=Command)
@click.argument("cache", type=FOLDER)
@click.option("--teacher", required=True, help="The cache's teacher: folder or hub id.")
@VISION_TOWER
@click.option(
    "--data", required=True, multiple=True, help="The cache's tars, as for build-cache. Repeatable."
)
@DEVICE
@click.option(
    "--samples", default=64, show_default=True, type=click.IntRange(min=1),
    help="Samples to compare, evenly spread over the tars.",
)  # fmt: skip
@click.option(
    "--student", "students", multiple=True,
    help="Also compare this student's losses and gradients: a folder or hub id as for "
    "train-student, with fresh adapters; or the folder of a run, for its export and its adapters. "
    "Repeatable: the start and the end of a training.",
)  # fmt: skip
@click.option(
    "--student-vision-tower", help="CLIP folder or hub id.  [default: the student's config says]"
)
@click.option(
    "--recipe", help="The students' recipe: loss weights, batch, seed; as for train-student.  "
    "[default: stage2]",
)  # fmt: skip
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="Change one value of the recipe. Repeatable.",
)  # fmt: skip
@AS_JSON
def fidelity(
    cache: Path, teacher: str, vision_tower: str | None, data: tuple[str, ...], device: str | None,
    samples: int, students: tuple[str, ...], student_vision_tower: str | None,
    recipe: str | None, settings: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Say what CACHE's encodings lose, and what that does to students.

    Runs the teacher on some of the samples again and compares each array with the exact values. For
    each student, loss terms and gradients of the recipe's batches are compared too, in float32.
    """
    only_with(
        "--student", bool(students), student_vision_tower=student_vision_tower, recipe=recipe,
        set=settings,
    )  # fmt: skip
    with announced(IMPORTING):
        from cache_builder.fidelity import measure_cache, measure_students
    from shared.tar_names import expand_tars

    tower = ("--vision-tower", student_vision_tower) if student_vision_tower else ()
    named = [text for student in students for text in ("--student", student)]
    changes = [text for setting in settings for text in ("--set", setting)]
    with tempfile.TemporaryDirectory(prefix="fidelity-") as folder:
        exact = Path(folder)
        found = measure_cache(
            cache, teacher, expand_tars(data), exact, vision_tower=vision_tower, device=device,
            samples=samples,
        )  # fmt: skip
        reports: list[dict[str, Any]] = []
        if students:
            options = [*named, *tower, "--recipe", recipe or "stage2", *changes]
            try:
                reports = measure_students(cache, exact, found, options)
            except subprocess.CalledProcessError as failed:  # it has said why
                click.get_current_context().exit(failed.returncode)
    if as_json:
        values = {**dataclasses.asdict(found), "tars": [str(tar) for tar in found.tars]}
        click.echo(json.dumps({**values, "students": reports}, indent=1))
    else:
        click.echo(printable_lines(_lines(cache, found, reports)))


def _lines(
    cache: Path, found: "CacheFidelity", students: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    yield f"{cache}: {found.samples} samples of {len(found.tars)} tars"
    yield f"{'array':<16} {'encoding':<10} {'relative L2 error':>18} {'largest error':>18}"
    for array in found.arrays:
        yield (
            f"{array.array:<16} {array.encoding:<10} {array.relative_l2:>18.1e} "
            f"{array.largest:>18.1e}"
        )
    if found.other_ids:
        yield f"{100 * found.other_ids:.3g} % of the top k ids are others"
    for student in students:
        yield from _student_lines(student)


def _student_lines(student: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"{student['student']}: {student['steps']} steps of {student['batch']} samples"
    columns = ("value", "relative error", "(worst)", "gradient cosine", "(worst)")
    yield f"{'':<18}" + "".join(f"{column:>16}" for column in columns)
    for name, term in student["terms"].items():
        numbers = (f"{term['value']:.4g}", f"{term['error']:.1e}", f"{term['worst_error']:.1e}")
        yield f"{name:<18}" + "".join(f"{n:>16}" for n in (*numbers, *_cosines(term)))
    for name, group in student["groups"].items():
        yield f"  {name:<16}" + " " * 48 + "".join(f"{n:>16}" for n in _cosines(group))


def _cosines(found: Mapping[str, Any]) -> tuple[str, str]:
    return f"{found['cosine']:.6f}", f"{found['worst_cosine']:.6f}"
