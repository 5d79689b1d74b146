"""What a cache's encodings do to a student: its loss terms and gradients with exact and with
decoded targets.

`cache-tools fidelity` runs this as a process of its own, `python -m student_train.fidelity`, with
an exact cache of the samples that it chose; the reports go to stdout as JSON.

Everything runs in float32, whatever the recipe's precision: what is to be seen are the encodings.
Steps are the recipe's: an average over more samples than a step's would hide their errors.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import torch
from torch import Tensor

from shared.cache import Cache, open_cache
from shared.checkpoint import ModelFolder
from shared.console import FOLDER, Command, configure_logging
from shared.errors import TrainingError
from shared.images import ImageProcessor
from shared.memory import fitting
from shared.mobilevlm import keep_float32, load_model
from shared.progress import progress
from shared.tar_names import expand_tars
from shared.tokenizer import load_tokenizer
from student_train.batch import TrainingBatch
from student_train.config import Recipe, load_recipe
from student_train.loading import micro_batches
from student_train.runs import RunFolder
from student_train.setup import Inputs, check_fit, make_student
from student_train.student import TERMS, AlignedStudent
from student_train.training_set import TrainingSet, load_training_set

Gradient = dict[str, Tensor]
"Parameter -> gradient; what a loss does not reach is left out."

GROUPS = {
    "language model": "model.llm.", "projector": "model.projector.", "tower": "model.tower.",
    "adapters": "adapters.",
}  # fmt: skip
"Group of parameters -> prefix of their names."

_LESS = "--set micro_batch and global_batch to less, and gradient_checkpointing=true"
_ACCEPTED = "name the folder of a run as --student: what that run accepted is accepted here too."


@dataclass(frozen=True, kw_only=True)
class GradientFidelity:
    """Cosine between the gradients with exact and with decoded targets, over all steps."""

    cosine: float
    "Mean."
    worst_cosine: float
    "Of the worst step."


@dataclass(frozen=True, kw_only=True)
class TermFidelity(GradientFidelity):
    """The same for one loss term and its value."""

    value: float
    "With exact targets, mean over the steps."
    error: float
    "Relative error of a step's value, mean of its magnitude."
    worst_error: float
    "Of the worst step."


@dataclass(frozen=True, kw_only=True)
class StudentFidelity:
    """What the encodings do to one student."""

    student: str
    "As it was named."
    steps: int
    "Steps compared."
    batch: int
    "Samples of each."
    terms: dict[str, TermFidelity]
    "The loss's terms, and `loss`: their weighted sum."
    groups: dict[str, GradientFidelity]
    "Group of parameters -> its part of the loss's gradient."


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One student twice, with the same weights and adapters, each with its targets."""

    name: str
    "As it was given."
    exact: AlignedStudent
    "Decodes the exact cache."
    exact_samples: TrainingSet
    "With exact targets."
    decoded: AlignedStudent
    "Decodes the cache."
    decoded_samples: TrainingSet
    "The same samples with the cache's targets."


def load_pair(inputs: Inputs, recipe: Recipe, exact: Cache, cache: Cache, name: str) -> Pair:
    """A student as `train-student` makes it, and the exact cache's samples with both targets.

    Raises:
        ProjectError: student, recipe and cache do not fit.
    """
    torch.manual_seed(recipe.seed)
    folder = ModelFolder(inputs.student)
    model = load_model(folder, inputs.vision_tower)
    tokenizer = load_tokenizer(folder.path)
    processor = ImageProcessor(model.config.tower_folder, recipe.image_aspect)
    check_fit(cache, recipe, tokenizer, processor, model, inputs, or_else=_ACCEPTED)
    ours = make_student(model, recipe, exact, inputs.adapters)
    theirs = make_student(model, recipe, cache, inputs.adapters)
    theirs.adapters = ours.adapters  # where they are fresh, they are of other random numbers
    tars = expand_tars(inputs.data)
    samples = load_training_set(tars, recipe, tokenizer, processor, exact)
    samples = replace(samples, recipe=fitted(recipe, len(samples)))
    return Pair(
        name=name, exact=ours, exact_samples=samples,
        decoded=theirs, decoded_samples=replace(samples, source=cache),
    )  # fmt: skip


def inputs_of(name: str, vision_tower: str | None, cache: Cache, data: Sequence[str]) -> Inputs:
    """What a student is loaded from: a folder or hub id, or a run's export and adapters."""
    run = RunFolder(Path(name))
    if not run.exists:
        student, adapters, accepted = name, None, []
    else:
        settings = run.read_settings()
        if not settings.get("cache"):
            raise TrainingError(f"{name}: was trained without a cache; name its export instead")
        student, adapters = str(run.path / "export"), run.path / "adapters.safetensors"
        accepted = list(settings.get("accepted_mismatches", {}))
    return Inputs(
        data=data, eval_data=(), student=student, vision_tower=vision_tower, cache=cache.root,
        adapters=adapters, accept=accepted,
    )  # fmt: skip


def fitted(recipe: Recipe, samples: int) -> Recipe:
    """The recipe with batches that so few samples can fill, read in this process."""
    micro = min(recipe.micro_batch, samples)
    batch = min(recipe.global_batch, samples // micro * micro)
    return replace(recipe, micro_batch=micro, global_batch=batch, workers=0)


def measure_student(pair: Pair, device: torch.device) -> StudentFidelity:
    """Loss terms and gradients, step by step, with both targets."""
    keep_float32()
    pair.exact.to(device).train()
    pair.decoded.to(device).train()
    batch = pair.exact_samples.recipe.global_batch
    steps = len(pair.exact_samples) // batch
    ours, theirs = (
        micro_batches(samples, first_step=0, last_step=steps, rank=0, world=1, device=device)
        for samples in (pair.exact_samples, pair.decoded_samples)
    )
    records: dict[str, _Record] = {}
    both = zip(ours, theirs, strict=True)
    for micro, other_micro in progress("student", "step", both, total=steps):
        _compare_step(pair, micro, other_micro, device, records)
    return StudentFidelity(
        student=pair.name,
        steps=steps,
        batch=batch,
        terms={t: records[t].term() for t in (*TERMS, "loss") if t in records},
        groups={group: records[group].gradient() for group in GROUPS if group in records},
    )


def term_gradient(
    student: AlignedStudent, micro: Sequence[TrainingBatch], term: str, device: torch.device
) -> tuple[float, Gradient]:
    """One term's mean over a step, and its gradient, as the training loop defines them."""
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    counts = torch.stack([student.counts(batch) for batch in micro]).sum(dim=0).clamp(min=1)
    count = float(counts[TERMS.index(term)])
    value, gradient = 0.0, Gradient()
    for batch in micro:
        terms = student(batch.to(device))
        if term not in terms:  # no image in it
            continue
        mean = terms[term] / count
        value += float(mean.detach())
        parts = torch.autograd.grad(mean, list(trained.values()), allow_unused=True)
        found = zip(trained, parts, strict=True)
        _add(gradient, {name: part for name, part in found if part is not None})
    return value, gradient


def cosine(one: Gradient, other: Gradient, prefix: str = "") -> float | None:
    """Cosine between the parts of two gradients under a prefix; None if there is nothing."""
    names = [name for name in one.keys() & other.keys() if name.startswith(prefix)]
    product = sum(_dot(one[name], other[name]) for name in names)
    norms = sum(_dot(one[n], one[n]) for n in names) * sum(_dot(other[n], other[n]) for n in names)
    return product / norms**0.5 if norms else None


@dataclass(kw_only=True)
class _Record:
    """What the steps gave for one term or group."""

    values: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)

    def add(self, found: float | None) -> None:
        if found is not None:
            self.cosines.append(found)

    def add_values(self, exact: float, decoded: float) -> None:
        self.values.append(exact)
        self.errors.append(abs(decoded - exact) / max(abs(exact), 1e-30))

    def gradient(self) -> GradientFidelity:
        return GradientFidelity(cosine=_mean(self.cosines), worst_cosine=min(self.cosines))

    def term(self) -> TermFidelity:
        return TermFidelity(
            **vars(self.gradient()), value=_mean(self.values), error=_mean(self.errors),
            worst_error=max(self.errors),
        )  # fmt: skip


def _compare_step(
    pair: Pair,
    ours: Sequence[TrainingBatch],
    theirs: Sequence[TrainingBatch],
    device: torch.device,
    records: dict[str, _Record],
) -> None:
    # A term at a time, though each costs a forward pass: four gradients in memory instead of ten.
    loss, other_loss, gradient, other_gradient = 0.0, 0.0, Gradient(), Gradient()
    for term, weight in zip(TERMS, pair.exact.weights(), strict=True):
        if not weight:
            continue
        value, part = term_gradient(pair.exact, ours, term, device)
        other_value, other_part = term_gradient(pair.decoded, theirs, term, device)
        if part:
            record = records.setdefault(term, _Record())
            record.add_values(value, other_value)
            record.add(cosine(part, other_part))
        loss, other_loss = loss + weight * value, other_loss + weight * other_value
        _add(gradient, part, weight)
        _add(other_gradient, other_part, weight)
    whole = records.setdefault("loss", _Record())
    whole.add_values(loss, other_loss)
    whole.add(cosine(gradient, other_gradient))
    for group, prefix in GROUPS.items():
        found = cosine(gradient, other_gradient, prefix)
        if found is not None:
            records.setdefault(group, _Record()).add(found)


def _add(total: Gradient, part: Mapping[str, Tensor], weight: float = 1.0) -> None:
    for name, tensor in part.items():
        total[name] = total[name].add_(tensor, alpha=weight) if name in total else weight * tensor


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@click.command(cls=Command)
@click.option("--exact", required=True, type=FOLDER, help="Exact cache of some samples.")
@click.option("--cache", required=True, type=FOLDER, help="The cache.")
@click.option("--data", required=True, multiple=True, help="Tars of those samples. Repeatable.")
@click.option("--device", required=True, help="Where the students run.")
@click.option("--student", "students", required=True, multiple=True, help="Folder, hub id or run.")
@click.option("--vision-tower", help="CLIP folder or hub id, for all students.")
@click.option("--recipe", required=True, help="YAML file, or a shipped recipe.")
@click.option("--set", "settings", multiple=True, help="Change one value of the recipe.")
def main(
    exact: Path, cache: Path, data: tuple[str, ...], device: str, students: tuple[str, ...],
    vision_tower: str | None, recipe: str, settings: tuple[str, ...],
) -> None:  # fmt: skip
    """Print a JSON list with the report on each student."""
    configure_logging(verbose=False)
    # That --data holds samples which the exact cache does not is as it should be.
    logging.getLogger("student_train.training_set").setLevel(logging.ERROR)
    chosen, ours, theirs = load_recipe(recipe, settings), open_cache(exact), open_cache(cache)
    reports = []
    for name in students:
        inputs = inputs_of(name, vision_tower, theirs, data)
        pair, place = load_pair(inputs, chosen, ours, theirs, name), torch.device(device)
        with fitting(f"{name}: its gradients in float32 need", place, _LESS, TrainingError):
            reports.append(dataclasses.asdict(measure_student(pair, place)))
    click.echo(json.dumps(reports))


if __name__ == "__main__":
    main()
