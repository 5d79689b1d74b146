"""Opening what lies in a cache, interrupted."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from shared import inside


def interrupting(line: int, lines: list[int]) -> Callable[[FrameType, str, Any], Any]:
    """A trace function: Ctrl-C before the n-th line that runs in `shared/inside.py`."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != inside.__file__:
            return None
        if event == "line":
            lines.append(frame.f_lineno)
            if len(lines) == line:
                raise KeyboardInterrupt
        return trace

    return trace


def test_ctrl_c_at_any_line_is_ctrl_c_and_closes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"content")
    close, refused = os.close, []

    def watched(descriptor: int) -> None:
        try:
            close(descriptor)
        except OSError as error:
            refused.append(error)
            raise

    monkeypatch.setattr(os, "close", watched)
    for line in range(1, 100):
        lines: list[int] = []
        sys.settrace(interrupting(line, lines))
        try:
            close(inside.open_inside(tmp_path, "a/b/file"))
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
    assert 10 < line < 99
    assert not refused
