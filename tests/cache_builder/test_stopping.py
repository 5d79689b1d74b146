"""SIGTERM and Ctrl-C: a real `build-cache` is told to stop, and continued."""

import json
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from cache_builder.stopping import Stopped, StopRequest, stop_on_sigterm
from tests.processes import arguments, start, start_build
from tests.support import (
    FULL,
    build,
    builder,
    run_build,
    sample,
    stored_digests,
    text_sample,
    write_tar,
)


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    """Twelve tars: about a second of work."""
    return [
        write_tar(tmp_path / "tars" / f"t-{n:02d}.tar", sample(f"i{n}"), text_sample(f"t{n}"))
        for n in range(12)
    ]


@pytest.fixture
def begun(tmp_path: Path, tars: list[Path]) -> Callable[[], ForkServerProcess]:
    """A build in `cache` that has committed a shard; its output goes to `log`."""

    def run() -> ForkServerProcess:
        (tmp_path / "spec.yaml").write_text(json.dumps(FULL))
        given = arguments(tmp_path / "cache", tars, tmp_path / "spec.yaml")
        process = start_build(given, tmp_path / "log")
        while process.is_alive() and not any(tmp_path.glob("cache/records/*.json")):
            time.sleep(0.002)
        return process

    return run


def end_of(process: ForkServerProcess, log: Path) -> str:
    process.join(60)
    assert "Traceback" not in log.read_text()
    return log.read_text().splitlines()[-1]


def shards(out: Path) -> int:
    return len(list(out.glob("records/*.json")))


def test_sigterm_ends_a_build_with_0_and_the_same_command_continues_it(
    begun: Callable[[], ForkServerProcess], tmp_path: Path, tars: list[Path]
) -> None:
    process, out = begun(), tmp_path / "cache"
    process.terminate()

    line = end_of(process, tmp_path / "log")

    assert process.exitcode == 0
    built = shards(out)
    assert 0 < built < 12
    assert f"{built} shards built, 0 were there" in line
    assert line.endswith(f"with {12 - built} shards left: run the same command again to continue")
    assert len(list((out / "data").iterdir())) == built  # the shard in work was dropped or finished
    assert build(out, tars).built == 12 - built
    build(tmp_path / "alone", tars)
    assert stored_digests(out) == stored_digests(tmp_path / "alone")


def test_ctrl_c_ends_a_build_with_130_and_one_line(
    begun: Callable[[], ForkServerProcess], tmp_path: Path, tars: list[Path]
) -> None:
    process, out = begun(), tmp_path / "cache"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)

    line = end_of(process, tmp_path / "log")

    assert process.exitcode == 130
    assert line == "Interrupted: what was committed stays, nothing half counts"
    built = shards(out)
    assert 0 < built < 12
    assert build(out, tars).built == 12 - built


def test_sigterm_while_nobody_looks_ends_that_at_once() -> None:
    with pytest.raises(Stopped), stop_on_sigterm():
        signal.raise_signal(signal.SIGTERM)


def test_a_second_sigterm_kills(tmp_path: Path) -> None:
    process = start(ask_twice, log=tmp_path / "log")
    process.join(60)

    assert process.exitcode == -signal.SIGTERM
    assert (tmp_path / "log").read_text() == "asked once\n"


def ask_twice() -> None:
    with stop_on_sigterm() as stop:
        stop.is_watched = True
        signal.raise_signal(signal.SIGTERM)
        print("asked once" if stop.requested else "not asked", flush=True)
        signal.raise_signal(signal.SIGTERM)
        print("asked twice and still here", flush=True)


def test_a_stop_before_the_first_shard_leaves_no_data(tmp_path: Path, tars: list[Path]) -> None:
    stop = StopRequest()
    stop.requested = True

    report = run_build(builder(), tars, tmp_path / "cache", stop=stop)

    assert (report.built, report.left) == (0, 12)
    assert not (tmp_path / "cache" / "data").exists()
