"""What a run says of its pace."""

import json
import math
import threading
from pathlib import Path

import pytest

from shared.errors import TrainingError
from student_train import watch
from student_train.evaluate import Scores
from student_train.runs import RunFolder
from tests.support import full_disk


def test_an_evaluation_between_two_log_lines_does_not_count_as_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    seen = watch.Watch(RunFolder(tmp_path), main=True, every=2, first=0, last=4, unlogged={})

    with seen:
        for step in range(1, 5):
            now += 1.0
            seen.step(step, {"loss": 1.0}, 1.0, 1e-3, 40)
            if step == 3:
                with seen.paused():
                    now += 100.0
                seen.evaluation(step, Scores(nats=1.0, positions=1))

    lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert [line["samples_per_second"] for line in lines if "loss" in line] == [40.0, 40.0]
    assert seen.seconds == 4.0


def test_a_term_counts_in_the_steps_that_have_it(tmp_path: Path) -> None:
    """Text-only batches have no attention: their zero is not a loss."""
    first = watch.Watch(RunFolder(tmp_path), main=True, every=4, first=0, last=4, unlogged={})
    with first:
        first.step(1, {"loss": 1.0, "attention": 2.0}, 1.0, 1e-3, 40)
        first.step(2, {"loss": 3.0}, 1.0, 1e-3, 40)
    saved = json.loads(json.dumps(first.unlogged))
    resumed = watch.Watch(RunFolder(tmp_path), main=True, every=4, first=2, last=4, unlogged=saved)
    with resumed:
        resumed.step(3, {"loss": 5.0, "attention": 4.0}, 1.0, 1e-3, 40)
        resumed.step(4, {"loss": 7.0}, 1.0, 1e-3, 40)

    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (line["loss"], line["attention"]) == (4.0, 3.0)


def test_a_step_that_the_scaler_left_out_is_not_in_a_line_s_means(tmp_path: Path) -> None:
    seen = watch.Watch(RunFolder(tmp_path), main=True, every=2, first=0, last=4, unlogged={})

    with seen:
        seen.step(1, {"loss": 1.0}, 2.0, 1e-3, 40)
        for step in (2, 3, 4):
            seen.step(step, {"loss": 3.0}, math.inf, 1e-3, 40)
        seen.evaluation(4, Scores(nats=math.nan, positions=1))

    first, second, third = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (first["loss"], first["grad_norm"]) == (1.0, 2.0)
    assert second.keys() == {"step", "lr", "samples_per_second"}
    assert third == {"step": 4, "eval_loss": None}


# A log line goes to the disk at once, events when there are many: by a thread that shows its error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("most", "name"), [(10, "log.jsonl"), (40_000, "tensorboard")])
def test_a_log_that_cannot_be_written_is_one_of_our_errors(
    tmp_path: Path, most: int, name: str
) -> None:
    seen = watch.Watch(RunFolder(tmp_path), main=True, every=1, first=0, last=10_000, unlogged={})

    def steps() -> None:
        with full_disk(most), seen:
            for step in range(1, 10_000):
                seen.step(step, {"loss": 1.0}, 2.0, 1e-3, 40)

    with pytest.raises(TrainingError, match=rf"{name}: cannot be written \(File too large\)"):
        steps()
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("tensorboard"):
            thread.join(timeout=10)  # or its error would be the next test's


def test_logs_that_cannot_be_opened_are_one_of_our_errors(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()

    with pytest.raises(TrainingError, match=r"log.jsonl: cannot be written \(Is a directory\)"):
        watch.Watch(RunFolder(tmp_path), main=True, every=1, first=0, last=1, unlogged={})
