"""Indexes of tars, and samples read by position."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from shared.errors import InputError, UnusableSample
from shared.samples import index_tar, read_sample, tar_sha256
from shared.tar_names import expand_tars
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
    for entry in index.samples:
        read_sample(index.path, entry)


def test_equal_images_have_equal_digests_whatever_their_samples(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("a"), sample("b"), sample("c", image=png(9)))
    digests = [read_sample(tar, entry).image_digest for entry in index_tar(tar).samples]

    assert digests[0] == digests[1] != digests[2]


def test_the_digest_of_a_tar_is_that_of_its_bytes_and_all_of_them_are_told(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("a", image=os.urandom(3 * 2**20)))
    told: list[int] = []

    assert tar_sha256(tar, told.append) == hashlib.sha256(tar.read_bytes()).hexdigest()
    assert sum(told) == tar.stat().st_size
    assert len(told) > 3


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


def test_tars_keep_the_order_in_which_they_were_named(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / folder / name) for folder, name in ("zb", "ac", "za")]

    assert expand_tars([str(tar) for tar in tars]) == tars


def test_a_pattern_below_a_file_matches_no_tar(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar")

    with pytest.raises(InputError, match=r"t\.tar/\*\.tar: matches no tar"):
        expand_tars([f"{tar}/*.tar"])


# Tars of strangers


def make_tar(path: Path, *members: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of these headers, each with as many zeros as it says, up to a megabyte."""
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(min(member.size, 2**20))))
    return path


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


def sign(content: bytearray, start: int = 0) -> bytes:
    """The header's checksum put right."""
    header = bytes(content[start : start + 148]) + b" " * 8 + bytes(content[start + 156 :][:356])
    content[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    return bytes(content)


def edited(tar: Path, offset: int, field: bytes) -> Path:
    """The first header with another field."""
    content = bytearray(tar.read_bytes())
    content[offset : offset + len(field)] = field
    tar.write_bytes(sign(content))
    return tar


@pytest.mark.parametrize(
    "size",
    [b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"\xff" * 12, b"\xff" * 10 + b"\xfe\0"],
)
def test_a_member_of_huge_or_negative_size_is_an_error(tmp_path: Path, size: bytes) -> None:
    tar = edited(write_tar(tmp_path / "t.tar", sample("a")), 124, size)

    with pytest.raises(InputError, match="truncated or not a tar"):
        index_tar(tar)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_long_name_or_extended_header_of_gigabytes_is_not_read(
    tmp_path: Path, kind: bytes
) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("a"))
    edited(edited(tar, 156, kind), 124, b"40000000000\0")  # 4 GiB
    os.truncate(tar, 5 * 2**30)  # takes no room

    with pytest.raises(InputError, match="a header of 4294967296 bytes, at most 1048576"):
        index_tar(tar)


def test_a_chain_of_long_names_is_an_error(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("a"))
    header = bytearray(512)
    header[:1], header[124:136], header[156:157] = b"a", b"%011o\0" % 0, b"L"
    header[257:265] = b"ustar  \0"
    tar.write_bytes(sign(header) * 5000 + tar.read_bytes())

    with pytest.raises(InputError, match="truncated or not a tar"):
        index_tar(tar)


def test_a_sparse_member_is_skipped(tmp_path: Path) -> None:
    sparse = member("a.json")
    sparse.pax_headers = {
        "GNU.sparse.size": "5",
        "GNU.sparse.map": "0,5",
        "GNU.sparse.name": "a.json",
    }
    tar = make_tar(tmp_path / "t.tar", sparse)

    assert index_tar(tar).skipped == {"a": "member is a link or special file"}


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "a" * 513, "\udcff"])
def test_a_name_that_cannot_be_printed_or_is_too_long_is_skipped_and_listed(
    tmp_path: Path, name: str
) -> None:
    tar = make_tar(tmp_path / "t.tar", member(f"{name}.json"), form=tarfile.GNU_FORMAT)

    ((listed, reason),) = index_tar(tar).skipped.items()

    assert reason == "name is empty, over 512 characters, or cannot be printed"
    assert listed.isprintable()
    assert len(listed) < 530


def test_an_image_or_json_that_is_too_large_is_skipped_unread(tmp_path: Path) -> None:
    tar = tmp_path / "t.tar"
    with tarfile.open(tar, "w") as file:
        file.addfile(member("a.json"))
    content = bytearray(tar.read_bytes())
    large = bytearray(content[:512])
    large[:6], large[124:136] = b"a.png\0", b"%011o\0" % (2**26 + 512)
    tar.write_bytes(bytes(content[:512]) + sign(large))
    os.truncate(tar, 2**26 + 10240)

    assert index_tar(tar).skipped == {"a": "image of 67109376 bytes, at most 67108864"}


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        (b"[" * 100_000, "JSON cannot be parsed"),
        (
            b"[" + b"[]," * 200_000 + b"[]]",
            "JSON cannot be parsed (200002 lists and objects, at most 200000)",
        ),
        (b'{"a":' + b"9" * 5000 + b"}", "JSON cannot be parsed"),
        (b'{"conversations":[{"from":' + b"[" * 300 + b"]" * 300 + b"}]}", "odd role"),
        (json.dumps({"conversations": [{"from": "\x1b[2J" * 999}]}).encode(), "odd role"),
    ],
)
def test_json_that_would_hurt_is_a_short_printable_reason(
    tmp_path: Path, note: bytes, reason: str
) -> None:
    index = index_tar(write_tar(tmp_path / "t.tar", sample("a", note)))

    with pytest.raises(UnusableSample) as found:
        read_sample(index.path, index.samples[0])

    assert str(found.value).startswith(reason)
    assert str(found.value).isprintable()
    assert len(str(found.value)) <= 300


def test_a_tar_of_more_samples_than_a_record_holds_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.samples.MAX_SAMPLES", 2)
    tar = write_tar(tmp_path / "t.tar", *(text_sample(f"s{n}") for n in range(3)))

    with pytest.raises(InputError, match="3 samples, at most 2 in a tar; pack it anew"):
        index_tar(tar)
