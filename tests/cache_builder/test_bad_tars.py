"""A tar that cannot be used is one clear line; the other tars are built, and nothing is lost."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.cache import open_cache
from shared.tar_names import expand_tars
from tests.support import (
    ALIGN_ONLY,
    build,
    command,
    denied,
    error_line,
    sample,
    skipped,
    text_sample,
    write_tar,
)


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    """Three tars of two samples."""
    return [
        write_tar(tmp_path / "tars" / f"t-{n}.tar", sample(f"image-{n}"), text_sample(f"text-{n}"))
        for n in range(3)
    ]


def test_a_missing_tar_is_named_before_anything_is_built(tmp_path: Path, tars: list[Path]) -> None:
    tars[1].unlink()

    line = error_line(command(tmp_path / "cache", [f"{tmp_path}/tars/t-{{0..2}}.tar"], ALIGN_ONLY))

    assert "t-1.tar: no such tar" in line
    assert not (tmp_path / "cache").exists()


def test_a_glob_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    line = error_line(command(tmp_path / "cache", [f"{tmp_path}/*.tar"], ALIGN_ONLY))

    assert "*.tar: matches no tar" in line


def test_a_tar_in_a_folder_whose_name_looks_like_a_pattern_is_found(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "set[1]" / "t.tar", sample("a"))

    assert expand_tars([str(tar)]) == [tar]


def test_an_unbalanced_brace_is_an_error(tmp_path: Path) -> None:
    line = error_line(command(tmp_path / "cache", [f"{tmp_path}/{{0..2.tar"], ALIGN_ONLY))

    assert "{0..2.tar" in line


def test_a_truncated_tar_does_not_stop_the_others_and_can_be_repaired(
    tmp_path: Path, tars: list[Path]
) -> None:
    whole = tars[1].read_bytes()
    tars[1].write_bytes(whole[:2000])

    line = error_line(command(tmp_path / "cache", tars, ALIGN_ONLY))

    assert "1 of 3 tars could not be read, the others are built" in line
    assert "t-1.tar: truncated or not a tar" in line
    assert set(open_cache(tmp_path / "cache").records) == {"t-0", "t-2"}
    tars[1].write_bytes(whole)
    again = command(tmp_path / "cache", tars, ALIGN_ONLY)
    assert again.exit_code == 0
    assert "1 shards built, 2 were there" in again.stdout
    assert len(open_cache(tmp_path / "cache")) == 6


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 9])
def test_a_tar_cut_at_any_block_of_its_end_is_refused(
    tmp_path: Path, tars: list[Path], blocks: int
) -> None:
    """Cut so that headers and contents are whole but the end mark is not, or a member is cut."""
    with tarfile.open(tars[0]) as tar:
        last = tar.getmembers()[-1]
    end = -(-(last.offset_data + last.size) // 512) * 512
    tars[0].write_bytes(tars[0].read_bytes()[: end - 512 * (blocks - 1)])

    line = error_line(command(tmp_path / "cache", tars[:1], ALIGN_ONLY))

    assert "t-0.tar: truncated or not a tar" in line


@pytest.mark.parametrize(
    ("behind", "message"),
    [
        (lambda tar: tar.read_bytes(), "more behind its end: damaged, or several tars in one file"),
        (lambda _: bytes(2**20), "over 1048576 bytes of zeros behind its last member"),
    ],
)
def test_a_tar_with_more_behind_its_end_is_refused(
    tmp_path: Path, tars: list[Path], behind: Callable[[Path], bytes], message: str
) -> None:
    """Samples there would be lost without a word."""
    tars[0].write_bytes(tars[0].read_bytes() + behind(tars[1]))

    assert message in error_line(command(tmp_path / "cache", tars[:1], ALIGN_ONLY))


@pytest.mark.parametrize("content", [b"", b"boat", b"\x1f\x8b\x08" + b"x" * 2000, b"x" * 10240])
def test_a_file_that_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(content)

    assert "t.tar: truncated or not a tar" in error_line(
        command(tmp_path / "cache", path, ALIGN_ONLY)
    )


def test_a_folder_in_place_of_tars_is_refused_with_the_pattern_that_was_meant(
    tmp_path: Path, tars: list[Path]
) -> None:
    line = error_line(command(tmp_path / "cache", tars[0].parent, ALIGN_ONLY))

    assert f"tars: is a folder; expected tars, as '{tmp_path}/tars/*.tar'" in line


@pytest.mark.parametrize("pattern", ["t-0.tar", "t-{0..2}.tar"])
def test_a_tar_in_a_folder_that_may_not_be_searched_is_one_line(
    tmp_path: Path, tars: list[Path], pattern: str
) -> None:
    with denied(tmp_path / "tars"):
        line = error_line(command(tmp_path / "cache", [f"{tmp_path}/tars/{pattern}"], ALIGN_ONLY))

    assert "tars/t-0.tar: cannot be read (Permission denied)" in line


@pytest.mark.parametrize("pattern", ["*.tar", "?/t-0.tar"])
def test_a_glob_in_a_folder_that_may_not_be_listed_says_so(
    tmp_path: Path, tars: list[Path], pattern: str
) -> None:
    with denied(tmp_path / "tars"):
        line = error_line(command(tmp_path / "cache", [f"{tmp_path}/tars/{pattern}"], ALIGN_ONLY))

    assert f"{tmp_path}/tars: cannot be read (Permission denied)" in line


def test_a_tar_that_may_not_be_read_is_not_called_truncated(
    tmp_path: Path, tars: list[Path]
) -> None:
    with denied(tars[1]):
        line = error_line(command(tmp_path / "cache", tars, ALIGN_ONLY))

    assert "1 of 3 tars could not be read, the others are built" in line
    assert "t-1.tar: cannot be read (Permission denied)" in line
    assert "truncated" not in line


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a Linux file that opens only")
def test_a_tar_on_a_disk_that_fails_is_not_called_truncated(tmp_path: Path) -> None:
    (tmp_path / "t.tar").symlink_to("/proc/self/mem")

    line = error_line(command(tmp_path / "cache", tmp_path / "t.tar", ALIGN_ONLY))

    assert "t.tar: cannot be read (Input/output error)" in line


def test_one_key_in_two_tars_is_refused_and_both_are_named(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{name}.tar", sample("boat")) for name in ("a", "b")]

    line = error_line(command(tmp_path / "cache", tars, ALIGN_ONLY))

    assert "sample 'boat' stands in a.tar and in b.tar" in line


def test_one_key_in_the_tars_of_two_runs_is_refused_and_the_cache_stays_readable(
    tmp_path: Path,
) -> None:
    tars = [write_tar(tmp_path / f"{name}.tar", sample("boat")) for name in ("a", "b")]
    build(tmp_path / "cache", tars[0], ALIGN_ONLY)

    line = error_line(command(tmp_path / "cache", tars[1], ALIGN_ONLY))

    assert "sample 'boat' stands in a.tar and in b.tar" in line
    assert open_cache(tmp_path / "cache").keys() == ["boat"]


def test_a_tar_whose_name_cannot_be_a_shards_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "my boats.tar", sample("boat"))

    assert "my boats.tar: rename it" in error_line(command(tmp_path / "cache", tar, ALIGN_ONLY))


def test_two_tars_of_one_name_are_refused(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / folder / "t.tar", sample(folder)) for folder in ("a", "b")]

    assert "share a name" in error_line(command(tmp_path / "cache", tars, ALIGN_ONLY))


def test_links_and_special_members_are_skipped_and_never_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(sample("x")[1][1])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        note = sample("boat")[0][1]
        member = tarfile.TarInfo("boat.json")
        member.size = len(note)
        tar.addfile(member, io.BytesIO(note))
        link = tarfile.TarInfo("boat.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
    (tmp_path / "t.tar").write_bytes(buffer.getvalue())

    build(tmp_path / "cache", tmp_path / "t.tar", ALIGN_ONLY)

    assert skipped(tmp_path / "cache", "t") == {"boat": "member is a link or special file"}


def test_folders_inside_a_tar_are_part_of_the_key(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("a/boat"), sample("b/boat"))

    build(tmp_path / "cache", tar, ALIGN_ONLY)

    assert open_cache(tmp_path / "cache").keys() == ["a/boat", "b/boat"]


def test_an_empty_tar_gives_a_shard_without_samples(tmp_path: Path) -> None:
    build(tmp_path / "cache", write_tar(tmp_path / "t.tar"), ALIGN_ONLY)

    assert len(open_cache(tmp_path / "cache")) == 0
