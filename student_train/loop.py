"""Training, told in order: batches -> loss terms -> gradients -> step -> log, evaluate, save.

One loss, one gradient: every term is summed over the micro-batches of all processes and divided once
by its count over the whole global batch, so how a batch is split changes nothing.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from shared.errors import TrainingError
from student_train.config import Recipe
from student_train.data import TrainingBatch, TrainingSet, micro_batches
from student_train.evaluate import HeldOutSet, Scores
from student_train.runs import RunFolder
from student_train.student import TERMS, AlignedStudent

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    steps: int
    "Optimiser steps in all."
    seconds: float
    "Wall time of this process's share of them, evaluation left out."
    scores: Scores | None
    "Final evaluation."


def train(
    student: AlignedStudent,
    training_set: TrainingSet,
    held_out: HeldOutSet | None,
    run: RunFolder,
    accelerator: Accelerator,
    checkpoint: Path | None,
) -> Outcome:
    """Train to the end, from `checkpoint` if there is one.

    Raises:
        TrainingError: fewer samples than a global batch, a batch that the processes cannot share,
            or a loss that is not finite.
    """
    recipe = training_set.recipe
    last_step = num_steps(training_set, accelerator.num_processes)
    optimizer = make_optimizer(student, recipe)
    scheduler = LambdaLR(optimizer, warmup_cosine(recipe.optim.warmup, last_step))
    if recipe.gradient_checkpointing:
        student.model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    module, optimizer = accelerator.prepare(student, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    first_step = _resume(accelerator, checkpoint)
    run.cut_log(first_step)
    batches = micro_batches(
        training_set, first_step=first_step, last_step=last_step,
        rank=accelerator.process_index, world=accelerator.num_processes,
    )  # fmt: skip
    module.train()
    scores, watch = None, _Watch(run, accelerator, recipe, first_step, last_step)
    with watch:
        for step, micro in enumerate(batches, start=first_step + 1):
            terms = _gradients(module, student, micro, accelerator)
            norm = accelerator.clip_grad_norm_(module.parameters(), recipe.optim.clip_norm)
            watch.check(step, terms, micro)
            rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            watch.step(step, terms, float(norm), rate, recipe.global_batch)
            due = recipe.eval_every and step % recipe.eval_every == 0
            if held_out is not None and (due or step == last_step):
                scores = watch.evaluation(step, _evaluate(student, held_out, accelerator))
            if step % recipe.save_every == 0 or step == last_step:
                save_checkpoint(run, accelerator, step, recipe.keep_checkpoints)
    if scores is None and held_out is not None:  # resumed at the end
        scores = _evaluate(student, held_out, accelerator)
    return Outcome(steps=last_step, seconds=watch.seconds, scores=scores)


def make_accelerator(recipe: Recipe, *, cpu: bool) -> Accelerator:
    """Devices and number format; processes come from torchrun or accelerate launch."""
    mixed = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[recipe.precision]
    # A micro-batch of text only uses neither the projector nor the adapters.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(mixed_precision=mixed, cpu=cpu, kwargs_handlers=[unused])


def num_steps(training_set: TrainingSet, world: int) -> int:
    """Optimiser steps of the whole run.

    Raises:
        TrainingError: too few samples, or a global batch that the processes cannot share.
    """
    recipe = training_set.recipe
    if recipe.global_batch % (recipe.micro_batch * world):
        raise TrainingError(
            f"global_batch {recipe.global_batch} cannot be shared by {world} processes in "
            f"micro-batches of {recipe.micro_batch}; --set micro_batch to a divisor of "
            f"{recipe.global_batch / world:g}"
        )
    per_epoch = len(training_set) // recipe.global_batch
    if not per_epoch:
        raise TrainingError(
            f"{len(training_set)} samples are fewer than one global batch of {recipe.global_batch}; "
            "--set global_batch to less"
        )
    return min(recipe.epochs * per_epoch, recipe.max_steps or recipe.epochs * per_epoch)


def make_optimizer(student: AlignedStudent, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over what is trained, in groups with a learning rate of their own."""
    optim = recipe.optim
    rates = {
        "model.projector.": optim.projector_lr or optim.lr,
        "adapters.": optim.adapter_lr,
        "": optim.lr,
    }
    groups: dict[str, list[Tensor]] = {prefix: [] for prefix in rates}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            prefix = next(prefix for prefix in rates if name.startswith(prefix))
            groups[prefix].append(parameter)
    # The language model first: its rate is the one that logs show.
    return torch.optim.AdamW(
        [{"params": groups[prefix], "lr": rates[prefix]} for prefix in ("", *list(rates)[:2]) if groups[prefix]],
        weight_decay=optim.weight_decay,
    )


def warmup_cosine(warmup: float, last_step: int) -> Callable[[int], float]:
    """Step -> share of the peak rate: linear rise over `warmup` of the steps, cosine to zero."""
    rising = math.ceil(warmup * last_step)

    def share(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        done = (step - rising) / max(1, last_step - rising)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return share


def save_checkpoint(run: RunFolder, accelerator: Accelerator, step: int, keep: int) -> None:
    """Write everything that a resumed run needs, then give it its name."""
    partial = run.checkpoint_path(step).with_suffix(".partial")
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        (partial / "progress.json").write_text(json.dumps({"step": step}))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.commit_checkpoint(partial, step, keep)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, checkpoint: Path | None) -> int:
    if checkpoint is None:
        return 0
    accelerator.load_state(str(checkpoint))
    step = int(json.loads((checkpoint / "progress.json").read_bytes())["step"])
    log.info("resumed from=%s step=%d", checkpoint.name, step)
    return step


def _gradients(
    module: torch.nn.Module,
    student: AlignedStudent,
    micro: Sequence[TrainingBatch],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Add up gradients of one global batch; the value of each term over all of it, and `loss`."""
    counts = sum((student.counts(batch) for batch in micro), torch.zeros(len(TERMS)))
    counts = accelerator.reduce(counts.to(accelerator.device, torch.float32), "sum").clamp(min=1)
    scale = torch.tensor(student.weights(), device=counts.device) / counts
    totals = torch.zeros(len(TERMS), device=accelerator.device)
    for number, batch in enumerate(micro):
        last = number == len(micro) - 1
        with nullcontext() if last else accelerator.no_sync(module):
            terms = module(batch.to(accelerator.device))
            parts = {name: terms[name] for name in TERMS if name in terms}
            loss = torch.stack([parts[name] * scale[TERMS.index(name)] for name in parts]).sum()
            # Data-parallel wrappers average over processes; a share of one sum must be added.
            accelerator.backward(loss * accelerator.num_processes)
        for name, value in parts.items():
            totals[TERMS.index(name)] += value.detach()
    totals = accelerator.reduce(totals, "sum")
    means = {name: float(totals[i] / counts[i]) for i, name in enumerate(TERMS) if student.weights()[i]}
    return {"loss": float((totals * scale).sum()), **means}


def _evaluate(student: AlignedStudent, held_out: HeldOutSet, accelerator: Accelerator) -> Scores:
    with accelerator.autocast():
        mine = held_out.score(
            student.model, rank=accelerator.process_index, world=accelerator.num_processes
        )
    sums = torch.tensor(list(vars(mine).values()), dtype=torch.float64, device=accelerator.device)
    nats, *counts = accelerator.reduce(sums, "sum").tolist()
    return Scores(**dict(zip(vars(mine), [nats, *map(round, counts)], strict=True)))


class _Watch:
    """What people see of a run: progress bar, log lines, JSONL, TensorBoard. Main process only."""

    def __init__(
        self, run: RunFolder, accelerator: Accelerator, recipe: Recipe, first: int, last: int
    ) -> None:
        self._main = accelerator.is_main_process
        self._every, self._last = recipe.log_every, last
        self._sums: dict[str, float] = {}
        self._since, self._paused, self._begun = 0, 0.0, time.monotonic()
        self._mark = self._begun
        self._redirect = logging_redirect_tqdm()
        self.seconds = 0.0
        "Wall time of training, evaluation left out."
        if self._main:
            from torch.utils.tensorboard import SummaryWriter

            self._bar = tqdm(initial=first, total=last, unit="step", desc="train")
            self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=first + 1)
            self._file = (run.path / "log.jsonl").open("a", buffering=1)

    def __enter__(self) -> "_Watch":
        self._redirect.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.seconds = time.monotonic() - self._begun - self._paused
        self._redirect.__exit__(*error)
        if self._main:
            self._bar.close()
            self._board.close()
            self._file.close()

    def check(self, step: int, terms: dict[str, float], micro: Sequence[TrainingBatch]) -> None:
        """Stop before a bad step; report samples that were left out of the batch."""
        for batch in micro:
            for sample in batch.skipped:
                log.warning("step=%d skipped=%s reason=%s", step, sample.key, sample.reason)
        if not math.isfinite(terms["loss"]):
            shown = " ".join(f"{name}={value:g}" for name, value in terms.items())
            raise TrainingError(
                f"step {step}: the loss is not finite ({shown}); the last checkpoint is whole, try a "
                "lower rate or precision bfloat16"
            )

    def step(self, step: int, terms: dict[str, float], norm: float, rate: float, samples: int) -> None:
        """Count one step; write when a line is due."""
        for name, value in {**terms, "grad_norm": norm}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._since += 1
        if not self._main:
            return
        self._bar.update()
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in terms.items()}, refresh=False)
        if step % self._every == 0 or step == self._last:
            now = time.monotonic()
            line = {name: total / self._since for name, total in self._sums.items()}
            line |= {"lr": rate, "samples_per_second": samples * self._since / (now - self._mark)}
            self._write(step, line)
            self._sums, self._since, self._mark = {}, 0, now

    def evaluation(self, step: int, scores: Scores) -> Scores:
        """Write an evaluation; its time does not count as training."""
        line: dict[str, float] = {"eval_loss": scores.loss}
        if scores.exact_match is not None:
            line["eval_exact_match"] = scores.exact_match
        if self._main:
            self._write(step, line)
        now = time.monotonic()
        self._paused += now - self._mark
        self._mark = now
        return scores

    def _write(self, step: int, line: dict[str, float]) -> None:
        log.info("step=%d/%d %s", step, self._last, " ".join(f"{k}={v:.4g}" for k, v in line.items()))
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        for name, value in line.items():
            self._board.add_scalar(name, value, step)
