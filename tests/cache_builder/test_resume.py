"""Running build-cache again continues it. What does not fit: tests/identity.py."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from cache_builder.committed import Committed
from cache_builder.summary import summarise
from shared.cache import open_cache
from shared.errors import CacheError, MismatchError
from tests.support import (
    ALIGN_ONLY,
    FULL,
    Push,
    build,
    builder,
    command,
    error_line,
    failing_fsync,
    png,
    record,
    sample,
    stored_digests,
    teacher_copy,
    text_sample,
    write_tar,
)


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    """Two tars of two samples."""
    return [
        write_tar(tmp_path / "tars" / f"t-{n}.tar", sample(f"image-{n}"), text_sample(f"text-{n}"))
        for n in range(2)
    ]


@pytest.fixture
def out(tmp_path: Path, tars: list[Path]) -> Path:
    """A cache of them."""
    build(tmp_path / "cache", tars)
    return tmp_path / "cache"


def snapshot(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_second_run_builds_nothing_and_writes_nothing(out: Path, tars: list[Path]) -> None:
    before = snapshot(out)

    report = build(out, tars)

    assert (report.built, report.present) == (0, 2)
    assert snapshot(out) == before


@pytest.mark.parametrize("name", ["._t-0.json", "notes.txt", "a b.json"])
def test_what_lies_beside_the_records_is_passed_over(
    out: Path, tars: list[Path], name: str
) -> None:
    (out / "records" / name).write_bytes(b"\0macOS")

    report = build(out, tars)

    assert (report.built, report.present) == (0, 2)
    assert len(open_cache(out)) == 4


def test_only_a_shard_without_record_is_rebuilt(out: Path, tars: list[Path]) -> None:
    before = stored_digests(out)
    kept = record(out, "t-1")
    (out / "records" / "t-0.json").unlink()

    report = build(out, tars)

    assert (report.built, report.present, report.samples) == (1, 1, 2)
    assert record(out, "t-1") == kept
    assert stored_digests(out) == before  # and with the same bytes


def test_more_tars_can_be_added(out: Path, tmp_path: Path) -> None:
    more = write_tar(tmp_path / "tars" / "u.tar", sample("image-9"))

    assert build(out, more).built == 1

    assert len(open_cache(out)) == 5


def test_two_builds_of_one_data_set_have_the_same_bytes(
    out: Path, tmp_path: Path, tars: list[Path]
) -> None:
    build(tmp_path / "again", tars)

    assert stored_digests(tmp_path / "again") == stored_digests(out)


def test_a_tar_that_changed_is_refused_and_both_digests_are_named(
    out: Path, tars: list[Path], tmp_path: Path
) -> None:
    old = record(out, "t-0").tar.sha256
    write_tar(tars[0], sample("image-0", image=png(7)), text_sample("text-0"))

    line = error_line(command(out, tars, FULL))

    assert "shard t-0: tar does not fit" in line
    assert f"sha256: '{old}' there" in line


def test_moving_tars_teacher_and_cache_changes_nothing(
    out: Path, tars: list[Path], tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(out, moved / "boats")
    shutil.move(tars[0].parent, moved / "tars")
    teacher = teacher_copy(moved / "teacher")

    report = build(moved / "boats", sorted((moved / "tars").glob("*")), FULL, teacher)

    assert (report.built, report.present) == (0, 2)
    assert str(tmp_path) not in (moved / "boats" / "records" / "t-0.json").read_text()


# Crashes


class Crash(Exception):
    """Not one of ours: the process dies here."""


def test_a_crash_at_a_push_to_the_disk_leaves_a_cache_that_can_be_continued(
    tmp_path: Path, tars: list[Path], pushes: list[Push], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "counted", tars[0], ALIGN_ONLY)
    total = len(pushes)
    assert total > 10
    # The last one comes after the record is in place: the shard is there, then.
    for after in (0, 1, total // 2, total - 3, total - 2):
        out = tmp_path / f"cache-{after}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing_fsync(Crash(), after))
            with pytest.raises(Crash):
                build(out, tars[0], ALIGN_ONLY)
        assert not list(out.glob("records/*.json")), after
        with pytest.raises(CacheError, match="no cache here"):
            open_cache(out)
    build(out, tars[0], ALIGN_ONLY)
    assert stored_digests(out) == stored_digests(tmp_path / "counted")


def test_a_full_disk_is_one_clear_line_and_the_run_can_be_repeated(
    tmp_path: Path, tars: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_fsync(full, 8))
        line = error_line(command(tmp_path / "cache", tars, ALIGN_ONLY))

    assert "shard t-0 cannot be written (No space left on device)" in line
    assert not list(tmp_path.glob("cache/records/*.json"))
    assert command(tmp_path / "cache", tars, ALIGN_ONLY).exit_code == 0


def test_a_plan_says_what_is_still_to_build_a_broken_tar_included(
    tmp_path: Path, tars: list[Path]
) -> None:
    whole = tars[1].read_bytes()
    tars[1].write_bytes(whole[:1000])

    error_line(command(tmp_path / "cache", tars, ALIGN_ONLY))

    summary = summarise(tmp_path / "cache")
    assert (summary.shards, summary.planned, summary.pending) == (1, 2, ("t-1",))
    tars[1].write_bytes(whole)
    build(tmp_path / "cache", tars, ALIGN_ONLY)
    assert summarise(tmp_path / "cache").pending == ()


def test_caches_of_one_build_merge_by_copying(out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build(other, write_tar(tmp_path / "u.tar", sample("image-9")))
    shutil.copytree(other, out, dirs_exist_ok=True)

    assert open_cache(out).keys() == ["image-0", "text-0", "image-1", "text-1", "image-9"]
    assert torch.from_numpy(open_cache(out).read("image-9").attention[0]).isfinite().all()


def test_a_shard_of_something_else_that_comes_while_a_build_runs_is_refused(
    tmp_path: Path,
) -> None:
    tars = [write_tar(tmp_path / f"t-{n}.tar", sample(f"a{n}")) for n in range(2)]
    out = tmp_path / "cache"
    build(out, tars[0], ALIGN_ONLY)
    seen = Committed(out, builder(ALIGN_ONLY).identity)
    build(tmp_path / "other", tars[1], ALIGN_ONLY, dtype="bfloat16")
    shutil.copy(tmp_path / "other" / "records" / "t-1.json", out / "records")

    with pytest.raises(MismatchError, match=r"shard t-1.*numerics\.dtype"):
        seen.refresh()
