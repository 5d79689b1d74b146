"""Stopping on SIGTERM, which schedulers and containers send before they kill.

The first SIGTERM asks. Whoever is at work looks at the request between two batches or steps, brings
to disk what is worth it, and ends; while nobody looks (loading a model, reading tars), the signal
ends that at once. A second SIGTERM kills, but not one that comes with the first: torchrun passes on
what a scheduler has sent to every process itself.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = "run the same command again to continue"
"What to do after a build was stopped."
_TOGETHER = 5.0
"Seconds in which signals are one request."


class Stopped(Exception):
    """A stop was asked for. No error: the command ends with 0."""


class StopRequest:
    """Whether to stop. Looked at by who is at work, set by the signal."""

    def __init__(self) -> None:
        self.requested = False
        "Whether a stop was asked for."
        self.is_watched = False
        "Whether somebody looks at the request from now on; else the signal raises Stopped itself."

    def check(self) -> None:
        """Raise Stopped if a stop was asked for."""
        if self.requested:
            raise Stopped


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """A request that SIGTERM sets, as long as the block runs.

    Once it is set, the signals that come with the first kill nobody who has ended in the meantime
    and says so.
    """
    stop, first = StopRequest(), 0.0

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if stop.requested:
            if time.monotonic() - first > _TOGETHER:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            return
        stop.requested, first = True, time.monotonic()
        if not stop.is_watched:
            stop.check()

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, on_signal if stop.requested else before)
