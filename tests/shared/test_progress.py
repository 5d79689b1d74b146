"""What commands say while they work."""

import time

import pytest

from shared import progress


def test_work_that_takes_long_is_named_while_it_lasts(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    said = ""

    with progress.announced("reading tea leaves"):
        while not said:
            time.sleep(0.01)
            said = capfd.readouterr().err

    assert said == "reading tea leaves ...\n"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_short_work_and_other_processes_of_a_run_say_nothing(
    rank: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(progress, "_PATIENCE", 0.05 if rank == "1" else 3600.0)

    with progress.announced("reading tea leaves"):
        time.sleep(0.2)

    assert not capfd.readouterr().err
