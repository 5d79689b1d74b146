"""SIGTERM and Ctrl-C: a real `build-cache` is told to stop, and continued."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cache_builder.cli import build_cache, cache_tools
from shared import stopping
from shared.stopping import Stopped, StopRequest, stop_on_sigterm
from tests.processes import arguments, start
from tests.support import (
    CLIP,
    FULL,
    TEACHER,
    build,
    builder,
    invoke,
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
def signalled(tmp_path: Path, tars: list[Path]) -> Callable[[int], tuple[int | None, str]]:
    """Exit code and last line of a build in `cache` that gets a signal after its first shard."""

    def run(number: int) -> tuple[int | None, str]:
        (tmp_path / "spec.yaml").write_text(json.dumps(FULL))
        given = arguments(tmp_path / "cache", tars, tmp_path / "spec.yaml")
        process = start(build_and_signal, given, tmp_path / "cache", number, log=tmp_path / "log")
        process.join()
        output = (tmp_path / "log").read_text()
        assert "Traceback" not in output
        return process.exitcode, output.splitlines()[-1]

    return run


def build_and_signal(given: list[str], out: Path, number: int) -> None:
    """`build-cache` that signals itself: a test that watched it might sleep until it has ended."""

    def watch() -> None:
        while not any(out.glob("records/*.json")):
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
    build_cache(given)


def shards(out: Path) -> int:
    return len(list(out.glob("records/*.json")))


def test_sigterm_ends_a_build_with_0_and_the_same_command_continues_it(
    signalled: Callable[[int], tuple[int | None, str]], tmp_path: Path, tars: list[Path]
) -> None:
    out = tmp_path / "cache"

    code, line = signalled(signal.SIGTERM)

    assert code == 0
    built = shards(out)
    assert 0 < built < 12
    assert f"{built} shards built, 0 were there" in line
    assert line.endswith(f"with {12 - built} shards left: run the same command again to continue")
    assert len(list((out / "data").iterdir())) == built  # the shard in work was dropped or finished
    assert build(out, tars).built == 12 - built
    build(tmp_path / "alone", tars)
    assert stored_digests(out) == stored_digests(tmp_path / "alone")


def repair_and_signal(given: list[str], out: Path) -> None:
    """`cache-tools repair` that signals itself when a second shard is there."""

    def watch() -> None:
        while len(list(out.glob("records/*.json"))) < 2:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    cache_tools(given)


def test_sigterm_ends_a_repair_that_rebuilds_with_0_and_the_same_command_continues_it(
    tmp_path: Path, tars: list[Path]
) -> None:
    out = tmp_path / "cache"
    build(out, tars)
    before = stored_digests(out)
    for tar in tars[1:]:
        (out / "records" / f"{tar.stem}.json").unlink()
    given = [
        *("repair", str(out), "--teacher", str(TEACHER), "--vision-tower", str(CLIP)),
        *("--data", str(tars[0].parent / "*.tar"), "--device", "cpu"),
    ]

    process = start(repair_and_signal, given, out, log=tmp_path / "log")
    process.join()

    output = (tmp_path / "log").read_text()
    assert process.exitcode == 0, output
    left = 12 - shards(out)
    assert 0 < left < 11
    assert output.splitlines()[-1].endswith(
        f"; stopped by SIGTERM with {left} shards left: run the same command again to continue"
    )
    assert f"{left} shards built" in invoke(cache_tools, *given).stdout
    assert stored_digests(out) == before


def test_ctrl_c_ends_a_build_with_130_and_one_line(
    signalled: Callable[[int], tuple[int | None, str]], tmp_path: Path, tars: list[Path]
) -> None:
    out = tmp_path / "cache"

    code, line = signalled(signal.SIGINT)

    assert code == 130
    assert line == "Interrupted: what was committed stays, nothing half counts"
    built = shards(out)
    assert 0 < built < 12
    assert build(out, tars).built == 12 - built


def test_sigterm_while_nobody_looks_ends_that_at_once() -> None:
    with pytest.raises(Stopped), stop_on_sigterm():
        signal.raise_signal(signal.SIGTERM)


def test_a_second_sigterm_kills(tmp_path: Path) -> None:
    process = start(ask_twice, log=tmp_path / "log")
    process.join()

    assert process.exitcode == -signal.SIGTERM
    assert (tmp_path / "log").read_text() == "asked once\n"


def ask_twice() -> None:
    stopping._TOGETHER = 0.1
    with stop_on_sigterm() as stop:
        stop.is_watched = True
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # one request with the first
        time.sleep(0.2)
        print("asked once" if stop.requested else "not asked", flush=True)
        signal.raise_signal(signal.SIGTERM)
        print("asked twice and still here", flush=True)


def test_a_stop_before_the_first_shard_leaves_no_data(tmp_path: Path, tars: list[Path]) -> None:
    stop = StopRequest()
    stop.requested = True

    report = run_build(builder(), tars, tmp_path / "cache", stop=stop)

    assert (report.built, report.left) == (0, 12)
    assert not (tmp_path / "cache" / "data").exists()
