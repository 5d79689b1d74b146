"""What a run says of its pace."""

import json
from pathlib import Path

import pytest

from student_train import watch
from student_train.evaluate import Scores
from student_train.runs import RunFolder


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
