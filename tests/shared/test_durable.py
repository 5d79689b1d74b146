"""What is written is on the disk before its name is, and a failure leaves what was there before."""

import errno
import os
from pathlib import Path

import pytest

from shared.durable import make_folder, put, put_file, sync_folder, sync_tree
from shared.errors import CacheError
from tests.support import Push, failing_fsync, full_disk


def test_a_small_file_is_on_the_disk_before_its_name_and_its_name_when_it_is_put(
    tmp_path: Path, pushes: list[Push]
) -> None:
    put(tmp_path / "a.json", b"content")

    (content, before), (folder, after) = pushes
    assert content.parent == folder == tmp_path
    assert before == {content.name} != {"a.json"}
    assert after == {"a.json"}


def test_missing_folders_are_each_on_the_disk_before_the_next(
    tmp_path: Path, pushes: list[Push]
) -> None:
    make_folder(tmp_path / "a" / "b" / "c")

    assert pushes == [(tmp_path, {"a"}), (tmp_path / "a", {"b"}), (tmp_path / "a" / "b", {"c"})]


def test_all_of_a_tree_is_pushed(tmp_path: Path, pushes: list[Push]) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).touch()

    sync_tree(tmp_path)

    assert {path for path, _ in pushes} == {tmp_path, *tmp_path.rglob("*")}


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    with full_disk(100), pytest.raises(CacheError, match=r"a\.json: cannot be written \(File too"):
        put_file(path, b"new" * 1000, CacheError)

    assert os.listdir(tmp_path) == ["a.json"]
    assert path.read_bytes() == b"old"


def test_a_file_that_was_interrupted_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", failing_fsync(KeyboardInterrupt()))

    with pytest.raises(KeyboardInterrupt):
        put(path, b"new")

    assert os.listdir(tmp_path) == ["a.json"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_mount_that_knows_no_pushing_of_folders_does_not_stop_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing_fsync(OSError(code, os.strerror(code))))

    sync_folder(tmp_path)


def test_a_folder_that_the_disk_does_not_take_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(os, "fsync", failing_fsync(error))

    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)
