"""The commit protocol under kills, faults and company: short modes of the proofs in benchmarks/.

Their full output is in docs/commit.md.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import concurrent_builds, kill_build
from shared.errors import CacheError, MismatchError
from shared.record import FORMAT, ShardRecord, TarFacts
from shared.spec import CacheSpec
from shared.store import new_shard
from tests.student_train.support import environment
from tests.support import FULL, Push, invoke

ROOT = Path(__file__).parents[2]


def test_kills_lose_double_and_change_nothing() -> None:
    result = invoke(kill_build.main, "--kills", "3", "--tars", "4")

    assert result.stdout.splitlines()[-1] == "content as left alone after 3 of 3 kills"


def test_builds_at_once_make_the_cache_of_one() -> None:
    result = invoke(concurrent_builds.main, "--rounds", "1", "--tars", "4")

    assert result.exit_code == 0, result.output


@pytest.mark.skipif(shutil.which("cc") is None, reason="faults.c needs a C compiler")
def test_faults_at_file_operations_leave_no_half_shard() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", "--short"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip

    assert done.stdout.splitlines()[-1] == "bad outcomes: 0", done.stdout + done.stderr[-2000:]


def facts(dtype: str = "float32", tar_sha256: str = "0" * 64) -> dict[str, object]:
    tar = TarFacts(name="t.tar", size=1, sha256=tar_sha256, index_sha256="1" * 64)
    identity = {
        "spec": CacheSpec.from_dict(FULL).to_dict(),
        "teacher": {
            "hidden_size": 1,
            "attention_heads": 1,
            "vision_tokens": 1,
            "vocab_size": 1,
            "weights_sha256": "",
        },
        "tokenizer": {"vocab_size": 1, "vocab_sha256": ""},
        "image_processor": {},
        "numerics": {"dtype": dtype},
    }
    return {
        "format": FORMAT, "identity": identity, "tar": tar, "keys": (), "lengths": (),
        "images": (), "skipped": (), "probe": (),
    }  # fmt: skip


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_a_shard_that_comes_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), new_shard(tmp_path, "t", **facts()):
            raise error

    assert files(tmp_path) == set()


def test_a_shard_that_another_build_committed_meanwhile_is_taken(tmp_path: Path) -> None:
    with new_shard(tmp_path, "t", **facts()) as slow:
        with new_shard(tmp_path, "t", **facts()) as fast:
            pass
        before = files(tmp_path / "records")

    assert slow.record == fast.record
    assert files(tmp_path / "records") == before
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_of_two_equal_shards_the_one_that_the_record_names_keeps_its_data(tmp_path: Path) -> None:
    with new_shard(tmp_path, "t", **facts()) as slow:
        slow.put("x", np.arange(3), ("sample",))
        with new_shard(tmp_path, "t", **facts()) as fast:
            fast.put("x", np.arange(3), ("sample",))

    found = ShardRecord.load(tmp_path, "t")
    assert {f"{found.data}/{name}" for name in found.files} == files(tmp_path) - {"records/t.json"}


def test_a_shard_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(MismatchError, match=r"numerics\.dtype: 'a' there, 'b' here"),
        new_shard(tmp_path, "t", **facts("b")),
        new_shard(tmp_path, "t", **facts("a")),
    ):
        pass

    assert '"dtype":"a"' in (tmp_path / "records" / "t.json").read_text()


def test_a_shard_of_another_tar_of_that_name_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(MismatchError, match=r"shard t: tar does not fit: sha256: '222"),
        new_shard(tmp_path, "t", **facts()),
        new_shard(tmp_path, "t", **facts(tar_sha256="2" * 64)),
    ):
        pass

    assert ShardRecord.load(tmp_path, "t").tar.sha256 == "2" * 64


def before_its_record(pushes: list[Push], root: Path) -> list[Push]:
    """What was pushed to the disk while the record had no name; its name alone was afterwards."""
    *before, (folder, names) = pushes
    assert (folder, names) == (root / "records", {"t.json"})
    assert not any("t.json" in there for _, there in before)
    return before


def test_a_record_is_in_place_after_all_that_it_names_is_on_the_disk(
    tmp_path: Path, pushes: list[Push]
) -> None:
    root = tmp_path / "cache"

    with new_shard(root, "t", **facts()) as writer:
        writer.put("x", np.arange(3), ("sample",))

    before = before_its_record(pushes, root)
    (data,) = (root / "data").iterdir()
    assert len([path for path in data.rglob("*") if path.is_file()]) > 2
    for path in (data, *data.rglob("*")):
        assert (path, set(os.listdir(path if path.is_dir() else path.parent))) in before
        assert any(folder == path.parent and path.name in names for folder, names in before)
    assert any(path == root and "data" in names for path, names in before)
    assert any(path == tmp_path and "cache" in names for path, names in before)


def test_folders_that_a_killed_build_left_are_on_the_disk_before_a_record(
    tmp_path: Path, pushes: list[Push]
) -> None:
    for name in ("data", "records"):
        (tmp_path / name).mkdir()

    with new_shard(tmp_path, "t", **facts()):
        pass

    assert tmp_path in {path for path, _ in before_its_record(pushes, tmp_path)}


def test_what_a_record_names_stays_also_if_its_name_is_not_known_to_be_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_descriptor: int) -> None:
        if (tmp_path / "records" / "t.json").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with (
        pytest.raises(CacheError, match="shard t cannot be written"),
        new_shard(tmp_path, "t", **facts()) as writer,
    ):
        writer.put("x", np.arange(3), ("sample",))

    found = ShardRecord.load(tmp_path, "t")
    assert {f"{found.data}/{name}" for name in found.files} == files(tmp_path) - {"records/t.json"}
