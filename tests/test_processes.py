"""The processes that tests and proofs start: what one is killed with must not stop the next."""

import os
import signal
from pathlib import Path

from tqdm import tqdm

from tests.processes import start


def test_a_process_killed_while_it_draws_its_bar_does_not_stop_the_next(tmp_path: Path) -> None:
    killed = start(die_with_the_bars_lock, log=tmp_path / "killed")
    killed.join()
    assert killed.exitcode == -signal.SIGKILL

    following = start(draw, log=tmp_path / "following")
    following.join(60)

    assert following.exitcode == 0, (tmp_path / "following").read_text()


def die_with_the_bars_lock() -> None:
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def draw() -> None:
    list(tqdm(range(3)))
