"""What people see of a run: progress bar, log lines, JSONL, TensorBoard. Main process only."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from shared.errors import TrainingError
from student_train.batch import TrainingBatch
from student_train.evaluate import Scores
from student_train.runs import RunFolder, writing

log = logging.getLogger(__name__)

Unlogged = Mapping[str, Sequence[int | float]]
"Name of a value -> its sum over the steps that have it, and how many these are."


class Watch:
    """Counts steps between log lines; a line holds the means over them."""

    def __init__(
        self,
        run: RunFolder,
        *,
        main: bool,
        every: int,
        first: int,
        last: int,
        unlogged: Unlogged,
    ) -> None:
        """Open the logs.

        Args:
            main: whether this process writes.
            every: steps between log lines.
            unlogged: what `unlogged` was when step `first` was saved.
        """
        self._main, self._every, self._last, self._path = main, every, last, run.path
        self._sums = dict(unlogged)
        self._timed, self._paused, self._begun = 0, 0.0, time.monotonic()
        self._mark = self._begun
        self._opened = ExitStack()
        self.seconds = 0.0
        "Wall time of training, evaluation left out."
        if self._main:
            from torch.utils.tensorboard import SummaryWriter

            run.cut_log(first)
            take = self._opened.enter_context
            self._bar = take(tqdm(initial=first, total=last, unit="step", desc="train"))
            board, file = run.path / "tensorboard", run.path / "log.jsonl"
            with writing(board):
                self._board = take(SummaryWriter(str(board), purge_step=first + 1))
            with writing(file):
                self._file = take(file.open("a", buffering=1))

    def __enter__(self) -> "Watch":
        self._opened.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.seconds = time.monotonic() - self._begun - self._paused
        try:
            with writing(self._path):
                self._opened.close()
        except TrainingError:
            if error is None:  # else that one says more
                raise

    @property
    def unlogged(self) -> Unlogged:
        """Of the steps since the last line: saved, so that a resumed run logs the same."""
        return dict(self._sums)

    def check(
        self, step: int, terms: Mapping[str, float], norm: float, micro: Sequence[TrainingBatch]
    ) -> None:
        """Report samples that were left out of the batch, and stop before a bad step.

        Args:
            norm: of the gradient, before it was clipped.

        Raises:
            TrainingError: the loss or its gradient is not finite.
        """
        for batch in micro:
            for sample in batch.skipped:
                log.warning("step=%d skipped=%s reason=%s", step, sample.key, sample.reason)
        if not math.isfinite(terms["loss"]) or not math.isfinite(norm):
            values = {**terms, "grad_norm": norm}
            shown = " ".join(f"{name}={value:g}" for name, value in values.items())
            raise TrainingError(
                f"step {step}: the loss or its gradient is not finite ({shown}); the last "
                "checkpoint is whole, try a lower rate or precision bfloat16"
            )

    def step(
        self, step: int, terms: Mapping[str, float], norm: float, rate: float, samples: int
    ) -> None:
        """Count one step; write when a line is due. One that float16's scaler left out, for an
        infinite gradient, is not in a line's means, nor is a term in those of steps without it.
        """
        if math.isfinite(norm):
            for name, value in {**terms, "grad_norm": norm}.items():
                total, steps = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, steps + 1)
        self._timed += 1
        if self._main:
            self._bar.update()
            shown = {name: f"{value:.3g}" for name, value in terms.items()}
            self._bar.set_postfix(shown, refresh=False)
        if step % self._every == 0 or step == self._last:
            now = time.monotonic()
            line = {name: total / steps for name, (total, steps) in self._sums.items()}
            line |= {"lr": rate, "samples_per_second": samples * self._timed / (now - self._mark)}
            self._write(step, line)
            self._sums, self._timed, self._mark = {}, 0, now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block's time does not count as training."""
        begun = time.monotonic()
        yield
        spent = time.monotonic() - begun
        self._paused += spent
        self._mark += spent

    def evaluation(self, step: int, scores: Scores) -> None:
        """Write an evaluation."""
        line: dict[str, float] = {"eval_loss": scores.loss}
        if scores.exact_match is not None:
            line["eval_exact_match"] = scores.exact_match
        self._write(step, line)

    def _write(self, step: int, line: Mapping[str, float]) -> None:
        if not self._main:
            return
        shown = " ".join(f"{name}={value:.4g}" for name, value in line.items())
        log.info("step=%d/%d %s", step, self._last, shown)
        # JSON has neither infinity nor NaN, which a held-out loss may be.
        numbers = {name: x if math.isfinite(x) else None for name, x in line.items()}
        with writing(self._path / "log.jsonl"):
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        with writing(self._path / "tensorboard"):
            for name, value in line.items():
                self._board.add_scalar(name, value, step)
