"""`build-cache` and `train-student` as real processes that start in a moment: forked from a server
that has imported everything, they run the command's own entry point and can be killed like any
other.
"""

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from tqdm import tqdm

from tests.support import CLIP, TEACHER

PRELOAD = ["tests.processes", "tests.preload"]


def context() -> ForkServerContext:
    """Where such processes come from; the first one takes the seconds that the imports take."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    return found


def arguments(out: Path, data: Sequence[Path | str], spec: Path, *options: str) -> list[str]:
    """What stands behind `build-cache`."""
    given = [
        *("--spec", spec, "--teacher", TEACHER, "--vision-tower", CLIP, "--out", out),
        *(text for item in data for text in ("--data", item)),
        *("--device", "cpu", *options),
    ]
    return [str(item) for item in given]


def start(target: Callable[..., object], *given: object, log: Path) -> ForkServerProcess:
    """A started process that calls `target(*given)`, its output in `log`."""
    process = context().Process(target=_redirected, args=(log, target, given))
    process.start()
    return process


def start_build(given: Sequence[str], log: Path) -> ForkServerProcess:
    """A started `build-cache`."""
    return start(_build_cache, list(given), log=log)


def start_training(given: Sequence[str], log: Path) -> ForkServerProcess:
    """A started `train-student`, the first of a process group of its own."""
    return start(_train_student, list(given), log=log)


def run_two(target: Callable[..., object], *given: object, folder: Path) -> Path:
    """Call `target(*given)` in two processes that find each other as under torchrun, to the end.

    Returns:
        Where the output of the first is: `rank-0` in `folder`, beside `rank-1`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"rank-{rank}" for rank in range(2)]
    both = [start(_ranked, n, port, target, given, log=log) for n, log in enumerate(logs)]
    for process, log in zip(both, logs, strict=True):
        process.join(200)
        assert process.exitcode == 0, log.read_text()[-4000:]
    return logs[0]


@atexit.register
def _kill_what_is_left() -> None:
    """Multiprocessing would wait at exit, for ever if one hangs."""
    for process in multiprocessing.active_children():
        process.kill()


def _redirected(log: Path, target: Callable[..., object], given: Sequence[object]) -> None:
    # tqdm's own lock is shared with everything that was forked from the server: one killed while it
    # drew would keep it for ever. A build that a user starts shares it with nobody.
    tqdm.set_lock(threading.RLock())
    # As in a terminal: what a shell starts in the background ignores Ctrl-C, and passes that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    target(*given)


def _ranked(rank: int, port: int, target: Callable[..., object], given: Sequence[object]) -> None:
    found = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": True,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in found.items()})
    target(*given)


def _build_cache(given: Sequence[str]) -> None:
    from cache_builder.cli import build_cache

    build_cache(given, prog_name="build-cache")


def _train_student(given: Sequence[str]) -> None:
    from student_train.cli import train_student

    os.setsid()
    train_student(given, prog_name="train-student")
