"""What people see while a command works: nothing is silent for more than two seconds."""

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

IMPORTING = "importing torch and transformers"
"What takes seconds, on a slow disk half a minute: to be `announced`."
_PATIENCE = 2.0
"Seconds in which nothing need be said."


def is_main_process() -> bool:
    """Whether this is the process that prints, of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def progress(
    what: str, unit: str, items: Iterable[Any] | None = None, *, total: int | None = None
) -> "tqdm[Any]":
    """A bar that appears after two seconds, in the process that prints; gone when it is done.

    Args:
        items: to be gone through; without them, `update` moves the bar.
    """
    return tqdm(
        items, total=total, unit=unit, unit_scale=unit == "B", desc=what, delay=_PATIENCE,
        leave=False, disable=not is_main_process(),
    )  # fmt: skip


@contextmanager
def announced(what: str) -> Iterator[None]:
    """A line to stderr, by the process that prints, if the block takes long: for what no bar can
    count.
    """
    line = threading.Timer(_PATIENCE, print, [f"{what} ..."], {"file": sys.stderr, "flush": True})
    line.daemon = True
    if is_main_process():
        line.start()
    try:
        yield
    finally:
        line.cancel()
        if line.is_alive():  # what comes next may fork
            line.join()
