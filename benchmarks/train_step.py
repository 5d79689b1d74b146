"""What distilling from a cache adds to a training step: `make bench-step`.

Teacher and student have the 7B : 1.7B pair's proportions (32 : 24 layers, 32 : 16 heads, width
2 : 1, one vocabulary of 32,000, the same tower) at a width that a CPU runs in seconds. The steps
are the student module's own on the same micro-batch, in turns: without a teacher, with targets from
a cache, and with the teacher run inside the step (only as deep as the spec asks). A small student
is hard on the cache: the targets' cost does not shrink with its width.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from benchmarks.inputs import TeacherSize, write_tars, write_teacher
from cache_builder.build import build_cache
from cache_builder.setup import load_builder
from cache_builder.teacher import Teacher
from shared.cache import Cache, open_cache
from shared.checkpoint import ModelFolder
from shared.images import ImageProcessor
from shared.mobilevlm import load_model
from shared.spec import CacheSpec
from shared.strict import parse
from shared.tokenizer import load_tokenizer
from student_train.batch import TrainingBatch
from student_train.config import Recipe
from student_train.loop import make_optimizer
from student_train.student import AlignedStudent, TeacherShape
from student_train.training_set import TrainingSet, load_training_set

SPEC = Path(__file__).parents[1] / "cache_specs" / "default.yaml"
RECIPE = {
    "template": "v1", "image_aspect": "pad", "global_batch": 4, "micro_batch": 4, "workers": 0,
    "optim": {"lr": 1e-4},
}  # fmt: skip


@click.command()
@click.option(
    "--width", default=256, show_default=True, help="Of the student; the teacher's is 2x."
)
@click.option("--rounds", default=7, show_default=True, help="Turns; medians count.")
def main(width: int, rounds: int) -> None:
    """Make models, data and a cache; time the three steps; print a table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = {
            "teacher": TeacherSize(layers=32, width=2 * width, heads=32),
            "student": TeacherSize(layers=24, width=width, heads=16),
        }
        for name, size in sizes.items():
            (folder / name).mkdir()
            print(name, write_teacher(folder / name, size).removeprefix("teacher"))
        tars = write_tars(folder, tars=1, samples=4, size=(640, 480))
        spec = CacheSpec.load(SPEC)
        builder = load_builder(
            spec, str(folder / "teacher"), vision_tower=None, device="cpu", dtype=None,
            batch_size=4,
        )  # fmt: skip
        build_cache(builder, tars, folder / "cache")
        steps = make_steps(folder, tars, builder.teacher)
        seconds = _in_turns(steps, rounds)
        _print(seconds, open_cache(folder / "cache"))


def make_steps(
    folder: Path, tars: Sequence[Path], teacher: Teacher
) -> dict[str, Callable[[], object]]:
    """The three steps, each a forward, a backward and an optimiser step."""
    recipe = parse(Recipe, RECIPE, where="benchmark")
    cache = open_cache(folder / "cache")
    plain, cached = (_training_set(folder, tars, recipe, source) for source in (None, cache))
    alone, taught = _step_of(folder, recipe, None), _step_of(folder, recipe, cache)
    batch, batch_alone = cached[[0, 1, 2, 3]], plain[[0, 1, 2, 3]]
    print(f"4 samples of {batch.sequences.ids.shape[1]} tokens\n")

    def with_teacher() -> None:
        vision = teacher.vision_tokens(batch.pixels)
        teacher.signals(batch.sequences, list(vision))
        taught(batch)

    return {
        "no teacher": lambda: alone(batch_alone),
        "targets from a cache": lambda: taught(batch),
        "teacher in the step": with_teacher,
    }


@dataclass(frozen=True)
class _Step:
    """Forward, backward, update."""

    student: AlignedStudent
    optimiser: torch.optim.AdamW

    def __call__(self, batch: TrainingBatch) -> None:
        terms = self.student(batch)
        torch.stack(list(terms.values())).sum().backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


def _step_of(folder: Path, recipe: Recipe, cache: Cache | None) -> _Step:
    student = AlignedStudent(
        load_model(ModelFolder(str(folder / "student"))),
        recipe.loss,
        teacher=TeacherShape.of(cache.identity) if cache else None,
        spec=cache.spec if cache else None,
    )
    return _Step(student, make_optimizer(student, recipe))


def _training_set(
    folder: Path, tars: Sequence[Path], recipe: Recipe, source: Cache | None
) -> TrainingSet:
    student = folder / "student"
    processor = ImageProcessor(student / "clip", recipe.image_aspect)
    return load_training_set(tars, recipe, load_tokenizer(student), processor, source)


def _in_turns(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if turn:  # the first allocates
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _print(seconds: dict[str, float], cache: Cache) -> None:
    cached = seconds["targets from a cache"]
    print("| step | seconds | of the cached step | of the step without a teacher |")
    print("|---|---|---|---|")
    for name, found in seconds.items():
        print(
            f"| {name} | {found:.3f} | {found / cached:.2f} | {found / seconds['no teacher']:.2f} |"
        )
    begun = time.perf_counter()
    cache.read_batch(cache.keys())
    reading = time.perf_counter() - begun
    print(f"\nreading the targets: {reading:.4f} s, {reading / cached:.3f} of the cached step")


if __name__ == "__main__":
    main()
