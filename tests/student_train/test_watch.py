"""What a run says of its pace."""

import json
import logging
import math
import threading
from pathlib import Path

import pytest

from shared.errors import TrainingError
from student_train import watch
from student_train.evaluate import Scores
from student_train.runs import RunFolder
from tests.student_train.support import recipe, training_set
from tests.support import full_disk, sample, write_tar


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


def test_every_sample_that_a_step_is_without_has_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [sample(f"broken-{n}", image=b"no image") for n in range(2)]
    tar = write_tar(tmp_path / "t.tar", *broken, sample("good"))
    batch = training_set([tar], recipe(), None)[[0, 1, 2]]

    with (
        caplog.at_level(logging.WARNING),
        watch.Watch(RunFolder(tmp_path), main=False, every=1, first=0, last=1, unlogged={}) as seen,
    ):
        seen.check(1, {"loss": 1.0}, 1.0, [batch])

    assert [f"skipped=broken-{n} " in caplog.text for n in range(2)] == [True, True]


def test_a_line_of_fewer_steps_than_log_every_has_their_pace_and_the_last_step_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)

    with watch.Watch(
        RunFolder(tmp_path), main=True, every=3, first=2, last=5, unlogged={"loss": [2.0, 2]}
    ) as resumed:
        for step in range(3, 6):
            now += 1.0
            resumed.step(step, {"loss": 4.0}, 1.0, 1e-3, 40)

    lines = list(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()))
    assert [(line["step"], line["loss"]) for line in lines] == [(3, 2.0), (5, 4.0)]
    assert [line["samples_per_second"] for line in lines] == [40.0, 40.0]


def test_tensorboard_has_every_step_once_after_resuming(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, loss in ((0, 3, 1.0), (2, 4, 2.0)):  # step 3 was done, but not saved
        with watch.Watch(
            RunFolder(tmp_path), main=True, every=1, first=first, last=last, unlogged={}
        ) as seen:
            for step in range(first + 1, last + 1):
                seen.step(step, {"loss": loss}, 1.0, 1e-3, 40)

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    found = [(event.step, event.value) for event in board.Scalars("loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
