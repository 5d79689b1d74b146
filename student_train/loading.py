"""Which samples make which batch, and the batches in that order.

A plan is a function of lengths, seed and epoch alone, so any world size works on one cache, and a
resumed run goes on with the very next sample.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset

from shared.errors import ProjectError
from student_train.batch import TrainingBatch
from student_train.config import Recipe
from student_train.training_set import TrainingSet


def plan_epoch(
    lengths: Int[np.ndarray, " samples"], recipe: Recipe, epoch: int
) -> Int[np.ndarray, "steps global_batch"]:
    """Sample numbers of each global batch of one epoch; a function of its arguments alone.

    A last batch that is not full is left out; another epoch leaves out other samples.
    """
    random = np.random.default_rng((recipe.seed, epoch))
    order = random.permutation(len(lengths))
    steps = len(lengths) // recipe.global_batch
    order = order[: steps * recipe.global_batch]
    if recipe.group_by_length:
        pool = 50 * recipe.global_batch  # sorted within pools, so that batches stay random
        order = np.concatenate(
            [
                part[np.argsort(-lengths[part], kind="stable")]
                for part in np.split(order, range(pool, len(order), pool))
            ]
        )
        return random.permutation(order.reshape(steps, recipe.global_batch))
    return order.reshape(steps, recipe.global_batch)


def micro_batches(
    training_set: TrainingSet,
    *,
    first_step: int,
    last_step: int,
    rank: int,
    world: int,
    device: torch.device,
) -> Iterator[list[TrainingBatch]]:
    """This process's micro-batches, step by step, from `first_step` on, on their way to `device`.

    Worker processes are started by the call, not by the first step: what is forked then has no
    threads of logs and progress bars yet, whose locks a child would inherit as they are.
    """
    recipe = training_set.recipe
    each = recipe.global_batch // recipe.micro_batch // world

    def plan() -> Iterator[list[int]]:
        per_epoch = len(training_set) // recipe.global_batch
        epoch, batches = -1, np.empty((0, 0), dtype=np.int64)
        for step in range(first_step, last_step):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                batches = plan_epoch(training_set.lengths, recipe, epoch)
            mine = batches[step % per_epoch][rank::world]
            for part in mine.reshape(each, recipe.micro_batch):
                yield part.tolist()

    # batch_size None: the set makes whole batches itself.
    loader: DataLoader[TrainingBatch | ProjectError] = DataLoader(
        _ErrorsAsValues(training_set),  # type: ignore[arg-type]
        sampler=plan(),  # gone through once
        batch_size=None,
        num_workers=recipe.workers,
        prefetch_factor=4 if recipe.workers else None,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if recipe.workers else None,
        worker_init_fn=_heed_parent_only,
    )
    # A tensor of a worker process keeps a file open until it is gone, and a step may hold more of
    # them than a process may have. Pinning copies them already.
    is_shared = recipe.workers > 0 and device.type != "cuda"
    return _steps(iter(loader), each, copy=is_shared)


def _heed_parent_only(_worker: int) -> None:
    """In a worker process: SIGTERM from its parent ends it, one from elsewhere does not.

    A scheduler's reaches every process of a job, and the run still wants the batch in work.
    """

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()


def _steps(
    batches: Iterator[TrainingBatch | ProjectError], each: int, *, copy: bool
) -> Iterator[list[TrainingBatch]]:
    step: list[TrainingBatch] = []
    for batch in batches:
        if isinstance(batch, ProjectError):
            raise batch
        step.append(batch.copied() if copy else batch)
        if len(step) == each:
            yield step
            step = []


@dataclass(frozen=True)
class _ErrorsAsValues(Dataset[list[int]]):
    """Hands our own errors over as values: raised in a worker process, one would come out with the
    worker's traceback for its message.
    """

    batches: TrainingSet

    def __getitem__(  # type: ignore[override]
        self, numbers: Sequence[int]
    ) -> TrainingBatch | ProjectError:
        try:
            return self.batches[numbers]
        except ProjectError as error:
            return error
