"""Opening what lies in a cache: no descriptor is lost, whatever lies there."""

import gc
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from shared import inside
from shared.errors import DamagedError


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


def descriptors() -> set[str]:
    gc.collect()  # what earlier tests left, processes among it, closes when it goes
    return set(os.listdir("/proc/self/fd"))


def test_what_is_refused_is_closed_again(tmp_path: Path) -> None:
    (tmp_path / "a" / "folder").mkdir(parents=True)
    (tmp_path / "a" / "link").symlink_to("folder")
    os.mkfifo(tmp_path / "a" / "pipe")
    (tmp_path / "a" / "file").write_bytes(b"content")
    before = descriptors()

    for path in ("a/folder", "a/pipe", "a/link", "a/link/file", "a/../../file", "/etc/passwd"):
        with pytest.raises(DamagedError):
            inside.open_inside(tmp_path, path)
    with pytest.raises(DamagedError, match="is 7 bytes, expected at most 6"):
        inside.read_inside(tmp_path, "a/file", 6)

    assert descriptors() == before


def test_a_socket_is_damage_and_not_a_disk_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("file")  # a socket's path may be 108 bytes long

    with pytest.raises(DamagedError, match="file: is not made of files and folders"):
        inside.open_inside(tmp_path, "file")


def test_a_file_of_just_the_largest_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")

    assert inside.read_inside(tmp_path, "file", 7) == b"content"


def test_looking_through_many_folders_holds_a_few_at_a_time(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}" / "inner").mkdir(parents=True)
        (tmp_path / f"{number:02}" / "inner" / "file").touch()
    before = descriptors()

    counts = [len(descriptors()) for _ in inside.walk_inside(tmp_path, "")]

    assert len(counts) == 30
    assert len(set(counts)) == 1
    assert descriptors() == before


def test_folders_16_deep_are_looked_through_and_deeper_ones_refused(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*"abcdefghijklmnop")
    folder.mkdir(parents=True)
    (folder / "file").touch()
    assert [path for path, _ in inside.walk_inside(tmp_path, "")] == [
        "a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p/file"
    ]

    (folder / "q").mkdir()
    with pytest.raises(DamagedError, match=r"a/b/c/.*/q: lies too deep for a shard"):
        list(inside.walk_inside(tmp_path, ""))


def test_the_part_of_a_path_that_is_a_link_is_named_and_never_the_users_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "cache" / "a" / "b").mkdir(parents=True)
    (tmp_path / "cache" / "link").symlink_to("a")
    (tmp_path / "cache" / "a" / "file").touch()
    root = tmp_path / "mine"
    root.symlink_to("cache")

    with pytest.raises(DamagedError, match="mine/link: is a symbolic link"):
        inside.open_inside(root, "link/b/file")
    with pytest.raises(DamagedError, match="mine/a/file: is not made of files and folders"):
        inside.list_inside(root, "a/file")
