"""Training, told in order: batches -> loss terms -> gradients -> step -> log, evaluate, save.

One loss, one gradient: every term is summed over the micro-batches of all processes and divided
once by its count over the whole global batch, so how a batch is split changes nothing.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from shared.errors import ConfigError, TrainingError
from shared.memory import fitting
from shared.mobilevlm import keep_float32
from shared.progress import announced
from shared.stopping import Stopped, StopRequest
from student_train.batch import TrainingBatch
from student_train.config import Recipe
from student_train.evaluate import HeldOutSet, Scores
from student_train.loading import micro_batches
from student_train.runs import RunFolder, whole_or_gone
from student_train.student import TERMS, AlignedStudent
from student_train.training_set import TrainingSet
from student_train.watch import Unlogged, Watch

log = logging.getLogger(__name__)


_DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    steps: int
    "Optimiser steps that are done, of the whole run."
    last_step: int
    "The step that the run ends with."
    stopped: bool
    "Whether it was asked to stop; there is a checkpoint, and nothing else was made."
    seconds: float
    "Wall time of this process's share of the steps, evaluation left out."
    scores: Scores | None
    "Final evaluation."


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    "Steps that are done."
    unlogged: Unlogged = field(default_factory=dict)
    "Of the steps that no log line covers yet."
    evaluation_due: bool = False
    "Whether an evaluation of this step is still to be made."


def train(
    student: AlignedStudent,
    training_set: TrainingSet,
    held_out: HeldOutSet | None,
    run: RunFolder,
    accelerator: Accelerator,
    checkpoint: Path | None,
    stop: StopRequest | None = None,
) -> Outcome:
    """Train to the end, from `checkpoint` if there is one.

    Args:
        stop: looked at after each step; asked of one process, all of them stop there.

    Raises:
        Stopped: a stop was asked for while the loop was not running.
        TrainingError: fewer samples than a global batch, a batch that the processes cannot share,
            a micro-batch that needs more memory than the device has, a loss or gradient that is
            not finite, or a checkpoint that cannot be read or written.
    """
    recipe, stop = training_set.recipe, stop or StopRequest()
    last_step = num_steps(training_set, accelerator.num_processes)
    trainer = _Trainer.of(student, recipe, last_step, accelerator)
    state = _resume(accelerator, checkpoint)
    first_step = state.step
    batches = micro_batches(
        training_set, first_step=first_step, last_step=last_step, device=accelerator.device,
        rank=accelerator.process_index, world=accelerator.num_processes,
    )  # fmt: skip
    scores = None
    watch = Watch(
        run, main=accelerator.is_main_process, every=recipe.log_every, first=first_step,
        last=last_step, unlogged=state.unlogged,
    )  # fmt: skip
    stop.is_watched = True
    with watch:
        if held_out is not None and state.evaluation_due:
            _evaluate(first_step, student, held_out, accelerator, watch)
        for step, micro in enumerate(batches, start=first_step + 1):
            trainer.step(step, micro, watch)
            every = recipe.eval_every or last_step
            is_due = step % every == 0 and step != last_step
            is_stopped = _is_asked(stop, accelerator)
            if step % recipe.save_every == 0 or step == last_step or is_stopped:
                # Before the evaluation: if that fails, the training is not lost.
                state = RunState(step=step, unlogged=watch.unlogged, evaluation_due=is_due)
                save_checkpoint(run, accelerator, state, recipe.keep_checkpoints)
            if is_stopped:
                break
            if held_out is not None and is_due:
                _evaluate(step, student, held_out, accelerator, watch)
        stopped = _is_asked(stop, accelerator)  # perhaps while the last checkpoint was written
        if held_out is not None and not stopped:
            scores = _evaluate(last_step, student, held_out, accelerator, watch, stop)
            stopped = scores is None
            if scores is not None and not math.isfinite(scores.loss):
                raise TrainingError(
                    f"step {last_step}: the held-out loss is {scores.loss}, nothing is exported; "
                    "try a lower rate or precision bfloat16, in another --out"
                )
    stop.is_watched = False
    return Outcome(
        steps=state.step, last_step=last_step, stopped=stopped, seconds=watch.seconds, scores=scores
    )


@dataclass(frozen=True, kw_only=True)
class _Trainer:
    """What an optimiser step moves. Made by `of`."""

    student: AlignedStudent
    module: torch.nn.Module
    "The student as accelerate wraps it."
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    recipe: Recipe
    accelerator: Accelerator

    @classmethod
    def of(
        cls, student: AlignedStudent, recipe: Recipe, last_step: int, accelerator: Accelerator
    ) -> "_Trainer":
        """On the accelerator's device, ready to be saved and resumed."""
        optimizer = make_optimizer(student, recipe)
        scheduler = LambdaLR(optimizer, warmup_cosine(recipe.optim.warmup, last_step))
        device, advice = accelerator.device, "a smaller one, or a GPU with more"
        with (
            announced(f"moving the student to {device}"),
            fitting("the student needs", device, advice, TrainingError),
        ):
            module, optimizer = accelerator.prepare(student, optimizer)
        accelerator.register_for_checkpointing(scheduler)
        return cls(
            student=student, module=module.train(), optimizer=optimizer, scheduler=scheduler,
            recipe=recipe, accelerator=accelerator,
        )  # fmt: skip

    def step(self, step: int, micro: Sequence[TrainingBatch], watch: Watch) -> None:
        """One global batch: gradients, the optimiser's step, the schedule's."""
        recipe, accelerator = self.recipe, self.accelerator
        with fitting(
            f"step {step}: micro-batches of {recipe.micro_batch} need", accelerator.device,
            "--set micro_batch to less changes no result, --set gradient_checkpointing=true "
            "trades time for memory; weights, gradients and AdamW alone take 16 to 20 bytes a "
            "parameter", TrainingError,
        ):  # fmt: skip
            terms = _gradients(self.module, self.student, micro, accelerator)
            norm = accelerator.clip_grad_norm_(self.module.parameters(), recipe.optim.clip_norm)
            # float16's scaler meets an infinite gradient itself: it leaves the step out.
            watch.check(step, terms, 0.0 if accelerator.scaler else float(norm), micro)
            rate = float(self.scheduler.get_last_lr()[0])
            self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:  # float16 overflowed: the scaler retries
            self.scheduler.step()
        self.optimizer.zero_grad()
        watch.step(step, terms, float(norm), rate, recipe.global_batch)


def make_accelerator(recipe: Recipe, *, cpu: bool) -> Accelerator:
    """Devices and number format; processes come from torchrun or accelerate launch.

    Raises:
        ConfigError: float16 without a GPU, where accelerate would quietly train in float32;
            processes that torchrun started, but accelerate cannot join; or an accelerate that is
            set up for anything but data-parallel training.
    """
    mixed = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[recipe.precision]
    # A micro-batch of text only uses neither the projector nor the adapters.
    parallel = DistributedDataParallelKwargs(
        find_unused_parameters=True, gradient_as_bucket_view=True
    )
    keep_float32()
    # Others wait while the main process writes a checkpoint, perhaps to a slow disk.
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    accelerator = Accelerator(
        mixed_precision=mixed, cpu=cpu, kwargs_handlers=[parallel, patient],
        # The recipe splits batches; accelerate's environment would divide the gradient once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )  # fmt: skip
    if accelerator.distributed_type not in _DATA_PARALLEL:
        raise ConfigError(
            f"accelerate is set up for {accelerator.distributed_type.value}, but this trains "
            "data-parallel only: start it with torchrun, or choose MULTI_GPU in accelerate config"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started, but each would train on its own: torch sees no "
            "GPU. Install a CUDA build of torch, or train on CPUs with --cpu"
        )
    if mixed == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision float16 needs a GPU; on the CPU use bfloat16 or float32")
    return accelerator


def num_steps(training_set: TrainingSet, world: int) -> int:
    """Optimiser steps of the whole run.

    Raises:
        TrainingError: too few samples, or a global batch that the processes cannot share.
    """
    recipe = training_set.recipe
    share, odd = divmod(recipe.global_batch, world)
    if odd or share % recipe.micro_batch:
        fits = f"micro_batch to a divisor of {share}"
        if odd:
            fits = f"global_batch to a multiple of {world}"
        raise TrainingError(
            f"global_batch {recipe.global_batch} cannot be shared by {world} processes in "
            f"micro-batches of {recipe.micro_batch}; --set {fits}"
        )
    per_epoch = len(training_set) // recipe.global_batch
    if not per_epoch:
        raise TrainingError(
            f"{len(training_set)} samples are fewer than one global batch of "
            f"{recipe.global_batch}; --set global_batch to less"
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
    # The language model, last in `rates`, first: its rate is the one that logs show.
    return torch.optim.AdamW(
        [{"params": groups[p], "lr": rates[p]} for p in reversed(rates) if groups[p]],
        weight_decay=optim.weight_decay,
    )


def warmup_cosine(warmup: float, last_step: int) -> Callable[[int], float]:
    """Step -> share of the peak rate: linear rise over `warmup` of the steps, cosine to zero.

    As transformers' schedule, but for the rise: that one begins at zero, and a run's first step
    would change nothing.
    """
    rising = math.ceil(warmup * last_step)

    def share(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        done = (step - rising) / max(1, last_step - rising)
        return 0.5 * (1 + math.cos(math.pi * done))

    return share


def save_checkpoint(run: RunFolder, accelerator: Accelerator, state: RunState, keep: int) -> None:
    """Write everything that a resumed run needs, then give it its name.

    Args:
        keep: checkpoints that stay.

    Raises:
        TrainingError: it cannot be written.
    """
    partial = run.checkpoint_path(state.step).with_suffix(".partial")
    with whole_or_gone(partial):
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            (partial / "progress.json").write_text(json.dumps(asdict(state)))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            run.commit_checkpoint(partial, state.step)
    if accelerator.is_main_process:
        run.drop_checkpoints(keep)
    accelerator.wait_for_everyone()


def _is_asked(stop: StopRequest, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop, so that all do, after the same step."""
    if stop.requested:
        accelerator.set_trigger()
    return bool(accelerator.check_trigger())


def _resume(accelerator: Accelerator, checkpoint: Path | None) -> RunState:
    if checkpoint is None:
        return RunState()
    try:
        with announced(f"reading {checkpoint}"):
            accelerator.load_state(str(checkpoint))
        state = RunState(**json.loads((checkpoint / "progress.json").read_bytes()))
        if not all(isinstance(pair, list) for pair in state.unlogged.values()):
            state = replace(state, unlogged={})  # an earlier commit's sums, which lack their counts
    # torch.load, pickle and safetensors have reasons of their own.
    except (
        OSError, LookupError, ValueError, TypeError, RuntimeError, EOFError, UnpicklingError,
        SafetensorError,
    ) as error:  # fmt: skip
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise  # the checkpoint may be whole
        raise TrainingError(
            f"{checkpoint}: cannot be read ({' '.join(str(error).split())[:200]}); mend that; or, "
            "if its files are damaged, delete it: --resume goes on from the one before, or begins "
            "if there is none"
        ) from error
    log.info("resumed from=%s", checkpoint.name)
    return state


def _gradients(
    module: torch.nn.Module,
    student: AlignedStudent,
    micro: Sequence[TrainingBatch],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Add up gradients of one global batch; the value of each term over all of it, and `loss`.

    A term that no sample of it has is left out.
    """
    found = sum((student.counts(batch) for batch in micro), torch.zeros(len(TERMS)))
    found = accelerator.reduce(found.to(accelerator.device), "sum")
    counts = found.clamp(min=1)
    scale = torch.tensor(student.weights(), device=counts.device) / counts
    totals = torch.zeros(len(TERMS), device=accelerator.device)
    for number, batch in enumerate(micro):
        last = number == len(micro) - 1
        with nullcontext() if last else accelerator.no_sync(module):
            terms = module(batch.to(accelerator.device))
            loss = torch.stack([terms[name] * scale[TERMS.index(name)] for name in terms]).sum()
            # Data-parallel wrappers average over processes; a share of one sum must be added.
            accelerator.backward(loss * accelerator.num_processes)
        for name, value in terms.items():
            totals[TERMS.index(name)] += value.detach()
    totals = accelerator.reduce(totals, "sum")
    used = zip(TERMS, student.weights(), found.tolist(), (totals / counts).tolist(), strict=True)
    means = {name: mean for name, weight, count, mean in used if weight and count}
    return {"loss": float((totals * scale).sum()), **means}


def _evaluate(
    step: int,
    student: AlignedStudent,
    held_out: HeldOutSet,
    accelerator: Accelerator,
    watch: Watch,
    stop: StopRequest | None = None,
) -> Scores | None:
    """Scores of all processes together.

    Args:
        stop: cuts this evaluation short; asked of one process, all of them return None.
    """
    is_cut = False
    advice = "the checkpoints stay; shorter answers (--set max_new_tokens) take less"
    what = f"evaluation after step {step} needs"
    with watch.paused():
        with accelerator.autocast(), fitting(what, accelerator.device, advice, TrainingError):
            try:
                if stop:
                    stop.is_watched = False
                mine = held_out.score(
                    student.model, rank=accelerator.process_index, world=accelerator.num_processes
                )
            except Stopped:
                mine, is_cut = Scores(), True
            finally:
                if stop:  # processes that wait for one another must all come to the sum
                    stop.is_watched = True
        sums = torch.tensor(
            [is_cut, *vars(mine).values()], dtype=torch.float64, device=accelerator.device
        )
        num_cut, nats, *counts = accelerator.reduce(sums, "sum").tolist()
    if num_cut:
        return None
    scores = Scores(**dict(zip(vars(mine), [nats, *map(round, counts)], strict=True)))
    watch.evaluation(step, scores)
    return scores
