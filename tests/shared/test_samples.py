"""Indexes of tars, and samples read by position."""

import tarfile
from pathlib import Path

import pytest

from shared.errors import InputError, UnusableSample
from shared.samples import expand_tars, index_tar, read_sample, read_samples, tar_sha256
from tests.support import annotation, png, sample, text_sample, write_tar


def test_samples_are_read_by_position_in_any_order(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(5)]
    tar = write_tar(
        tmp_path / "t.tar",
        *(sample(name, annotation(f"<image>\n{name}"), png(n)) for n, name in enumerate(names)),
    )
    index = index_tar(tar)

    for number in (3, 0, 4, 1, 2):
        found = read_sample(tar, index.samples[number])
        assert found.key == names[number]
        assert found.image == png(number)
        assert found.conversation.turns[0].text == f"<image>\n{names[number]}"


def test_positions_are_those_that_tarfile_finds(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("a" * 300), text_sample("b"), sample("é/c"))
    with tarfile.open(tar) as opened:
        expected = {(m.offset_data, m.size) for m in opened}

    index = index_tar(tar)

    members = [m for s in index.samples for m in (s.annotation, s.image) if m]
    assert {(m.offset, m.size) for m in members} == expected
    assert [s.key for s in index.samples] == ["a" * 300, "b", "é/c"]


def test_a_tar_made_by_gnu_tar_reads_the_same(tmp_path: Path) -> None:
    import subprocess

    for name, content in (*sample("a"), *text_sample("b")):
        (tmp_path / name).write_bytes(content)
    subprocess.run(
        ["tar", "cf", "t.tar", "./a.json", "./a.png", "./b.json"], cwd=tmp_path, check=True
    )

    index = index_tar(tmp_path / "t.tar")

    assert [entry.key for entry in index.samples] == ["./a", "./b"]
    assert all(not isinstance(found, UnusableSample) for _, found in read_samples(index))


def test_equal_images_have_equal_digests_whatever_their_samples(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("a"), sample("b"), sample("c", image=png(9)))
    digests = [found.image_digest for _, found in read_samples(index_tar(tar))]  # type: ignore[union-attr]

    assert digests[0] == digests[1] != digests[2]


def test_a_tar_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("a"))
    index = index_tar(tar)
    tar.write_bytes(tar.read_bytes()[:100])

    with pytest.raises(InputError, match=r"t\.tar: cannot be read"):
        read_sample(tar, index.samples[0])


def test_a_tar_that_vanishes_is_an_error(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("a"))
    index = index_tar(tar)
    tar.unlink()

    with pytest.raises(InputError, match="No such file"):
        read_sample(tar, index.samples[0])
    with pytest.raises(InputError, match="No such file"):
        tar_sha256(tar)


def test_braces_and_globs_give_each_tar_once_in_order(tmp_path: Path) -> None:
    for number in (0, 1, 2, 10):
        write_tar(tmp_path / f"t-{number:02d}.tar")

    found = expand_tars([f"{tmp_path}/t-{{01..02}}.tar", f"{tmp_path}/t-*.tar"])

    assert [path.name for path in found] == ["t-01.tar", "t-02.tar", "t-00.tar", "t-10.tar"]


def test_one_tar_named_in_two_ways_is_one_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar")

    assert len(expand_tars([f"{tmp_path}/t.tar", f"{tmp_path}/./t.tar"])) == 1
