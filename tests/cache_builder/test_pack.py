"""`cache-tools pack`: LLaVA JSON and images -> tars, the same bytes for the same input."""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cache_builder.cli import cache_tools
from cache_builder.pack import pack
from shared.cache import open_cache
from shared.samples import index_tar, read_sample
from tests.support import ALIGN_ONLY, annotation, build, denied, error_line, invoke, png


def entry(key: object, image: object = None, **fields: Any) -> dict[str, Any]:
    question = "<image>\nwhat" if image else "what"
    found = annotation(question, "red", **fields) | {"id": key}
    return found | {"image": image} if image else found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images, one of them in a subfolder."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.png", "more/c.png")):
        (folder / name).write_bytes(png(seed))
    return folder


def write(tmp_path: Path, entries: object) -> Path:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(entries))
    return path


def run(tmp_path: Path, entries: object, images: Path, *options: str) -> Any:
    return invoke(
        cache_tools, "pack", "--annotations", str(write(tmp_path, entries)),
        "--images", str(images), "--out", str(tmp_path / "out"), *options,
    )  # fmt: skip


def keys(tar: Path) -> list[str]:
    return [entry.key for entry in index_tar(tar).samples]


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


ENTRIES: Sequence[dict[str, Any]] = (
    entry("a0", "a.png"), entry("t0"), entry("b0", "b.png"), entry("a1", "a.png"),
    entry("c0", "more/c.png"), entry("a2", "a.png"), entry("t1"),
)  # fmt: skip


def test_the_command_says_what_it_packed(tmp_path: Path, images: Path) -> None:
    result = run(tmp_path, ENTRIES, images, "--samples-per-tar", "2")

    assert result.exit_code == 0, result.output
    assert "3 tars, 7 samples, 3 images" in result.stdout


def test_a_set_without_images_needs_no_folder_of_them(tmp_path: Path) -> None:
    given = ("pack", "--out", str(tmp_path / "out"), "--annotations")

    result = invoke(cache_tools, *given, str(write(tmp_path, [entry("t0"), entry("t1")])))

    assert result.exit_code == 0, result.output
    assert "1 tars, 2 samples, 0 images" in result.stdout
    line = error_line(invoke(cache_tools, *given, str(write(tmp_path, ENTRIES))))
    assert "sample 'a0': names image 'a.png'; give its folder, --images" in line


def test_packing_twice_gives_the_same_bytes(tmp_path: Path, images: Path) -> None:
    path = write(tmp_path, ENTRIES)
    for name in ("one", "two"):
        pack(path, images, tmp_path / name, samples_per_tar=2, prefix="s")

    one, two = tars(tmp_path / "one"), tars(tmp_path / "two")
    assert [path.name for path in one] == ["s-000000.tar", "s-000001.tar", "s-000002.tar"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_conversations_about_one_image_stay_together(tmp_path: Path, images: Path) -> None:
    pack(write(tmp_path, ENTRIES), images, tmp_path / "out", samples_per_tar=2, prefix="s")

    assert [keys(tar) for tar in tars(tmp_path / "out")] == [
        ["a0", "a1", "a2"],  # one more than asked for
        ["t0", "b0"],
        ["c0", "t1"],
    ]


def test_what_was_packed_reads_back(tmp_path: Path, images: Path) -> None:
    pack(write(tmp_path, ENTRIES), images, tmp_path / "out", samples_per_tar=99, prefix="s")
    (tar,) = tars(tmp_path / "out")

    found = {entry.key: read_sample(tar, entry) for entry in index_tar(tar).samples}

    assert set(found) == {entry["id"] for entry in ENTRIES}
    assert found["c0"].image == (images / "more" / "c.png").read_bytes()
    assert found["t0"].image is None


def test_every_input_sample_is_packed_so_that_the_build_can_list_what_it_skips(
    tmp_path: Path, images: Path
) -> None:
    odd = [
        entry("odd-role", "a.png") | {"conversations": [{"from": "user", "value": "x"}]},
        {"id": "none"},
        entry("half", "b.png") | {"conversations": [{"from": "human", "value": "<image> \ud800"}]},
        entry("good", "b.png"),
    ]
    pack(write(tmp_path, odd), images, tmp_path / "out", samples_per_tar=9, prefix="s")

    report = build(tmp_path / "cache", tars(tmp_path / "out"), ALIGN_ONLY)

    assert (report.samples, report.skipped) == (1, 3)
    assert open_cache(tmp_path / "cache").keys() == ["good"]


@pytest.mark.parametrize(
    ("given", "key"), [("a/b.c", "a_b_c"), (7, "7"), ("00012", "00012"), ("é中", "é中")]
)
def test_an_id_becomes_a_webdataset_key(
    tmp_path: Path, images: Path, given: object, key: str
) -> None:
    pack(write(tmp_path, [entry(given)]), images, tmp_path / "out", samples_per_tar=9, prefix="s")

    assert keys(tars(tmp_path / "out")[0]) == [key]


def test_ids_that_stand_again_are_numbered_and_no_sample_is_lost(
    tmp_path: Path, images: Path
) -> None:
    # LLaVA-Instruct names up to three conversations by their one image.
    ids = ["a", "b.c", "a", "a-1", "a", "b/c"]
    entries = [
        entry(key, "a.png") | {"conversations": [*entry("x")["conversations"], {"n": n}]}
        for n, key in enumerate(ids)
    ]

    result = run(tmp_path, entries, images)

    assert "6 samples, 1 images; 3 ids stood before and are numbered" in result.stdout
    (tar,) = tars(tmp_path / "out")
    assert keys(tar) == ["a", "b_c", "a-2", "a-1", "a-3", "b_c-1"]
    with tarfile.open(tar) as file:
        texts = [file.extractfile(m) for m in file if m.name.endswith(".json")]
        assert [json.load(text)["id"] for text in texts if text] == ids


def test_members_carry_no_name_or_time_of_the_machine(tmp_path: Path, images: Path) -> None:
    pack(write(tmp_path, ENTRIES), images, tmp_path / "out", samples_per_tar=99, prefix="s")

    with tarfile.open(tars(tmp_path / "out")[0]) as tar:
        assert {(m.mtime, m.uname, m.gname, m.uid) for m in tar} == {(0, "", "", 0)}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"id": "a"}, "expected a list of objects"),
        (["a"], "expected a list of objects"),
        ([], "holds no samples"),
        ([{"conversations": []}], "entry 0 has no id"),
        ([{"id": None, "conversations": []}], "entry 0 has no id"),
        ([{"id": [1], "conversations": []}], "entry 0 has no id"),
        ([entry("a", "nowhere.png")], "1 of 1 samples name an image that is not there"),
        ([entry("a", "no\0where.png")], "1 of 1 samples name an image that is not there"),
        ([entry("a", "../annotations.json")], "leaves the image folder"),
        ([entry("a", "/etc/passwd")], "leaves the image folder"),
        ([entry("a", "a.gif")], "none of jpg, jpeg, png, webp"),
        ([entry("a", ["a.png", "b.png"])], "must be one file name"),
        ([entry("a\ud800")], "cannot be printed"),
        ([entry("a\n")], "cannot be printed"),
        ([entry("a" * 513)], "is over 512 characters"),
    ],
)
def test_bad_annotations_are_named_and_nothing_is_written(
    tmp_path: Path, images: Path, entries: object, message: str
) -> None:
    assert message in error_line(run(tmp_path, entries, images))
    assert not list(tmp_path.glob("out/*"))


def test_missing_images_are_counted_and_some_of_them_named(tmp_path: Path, images: Path) -> None:
    gone = [entry(f"g{n}", f"gone/{n % 5}.png") for n in range(1234)]

    line = error_line(run(tmp_path, [*ENTRIES, *gone], images))

    assert (
        "1,234 of 1,241 samples name an image that is not there: gone/0.png, gone/1.png, "
        "gone/2.png, ...; "
    ) in line
    assert f"put what is missing into {images}, name another folder with --images" in line
    assert not (tmp_path / "out").exists()


def test_up_to_three_missing_images_are_all_named(tmp_path: Path, images: Path) -> None:
    gone = [entry(f"g{n}", f"{n}.png") for n in range(3)]

    assert "not there: 0.png, 1.png, 2.png; " in error_line(run(tmp_path, gone, images))


def test_an_image_that_cannot_be_read_is_named_and_not_taken_for_the_output(
    tmp_path: Path, images: Path
) -> None:
    with denied(images / "b.png"):
        line = error_line(run(tmp_path, ENTRIES, images))

    assert f"{images}/b.png: cannot be read (Permission denied); make it readable" in line


def test_a_folder_of_images_that_may_not_be_searched_is_one_line(
    tmp_path: Path, images: Path
) -> None:
    with denied(images / "more"):
        line = error_line(run(tmp_path, ENTRIES, images))

    assert f"{images}/more/c.png: cannot be read (Permission denied)" in line


def test_looking_for_many_images_shows_a_bar(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        """tqdm's: hours pass between samples."""

        def __init__(self) -> None:
            self.now = 0.0

        def __call__(self) -> float:
            self.now += 3600
            return self.now

    monkeypatch.setattr("tqdm.std.time", Clock())

    assert "find images: 100%" in run(tmp_path, ENTRIES, images).stderr


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000])
def test_annotations_that_are_no_json(tmp_path: Path, images: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)

    line = error_line(
        invoke(
            cache_tools, "pack", "--annotations", str(path), "--images", str(images),
            "--out", str(tmp_path / "out"),
        )
    )  # fmt: skip

    assert "bad.json: is not JSON" in line


def test_a_missing_annotation_file_is_named(tmp_path: Path, images: Path) -> None:
    line = error_line(
        invoke(
            cache_tools, "pack", "--annotations", str(tmp_path / "no.json"),
            "--images", str(images), "--out", str(tmp_path / "out"),
        )
    )  # fmt: skip

    assert "no.json: cannot be read" in line


def test_tars_that_are_there_are_not_mixed_with_new_ones(tmp_path: Path, images: Path) -> None:
    assert run(tmp_path, ENTRIES, images).exit_code == 0

    assert "holds shard-*.tar already" in error_line(run(tmp_path, ENTRIES, images))


def test_an_out_that_cannot_be_written(tmp_path: Path, images: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("in the way")

    line = error_line(run(tmp_path, ENTRIES, images, "--out", str(tmp_path / "out" / "x" / "y")))

    assert "cannot be written" in line


@pytest.mark.parametrize("prefix", ["my boats", "../up", "a/b", "", ".x"])
def test_a_prefix_that_no_shard_can_have_is_refused_before_packing(
    tmp_path: Path, images: Path, prefix: str
) -> None:
    line = error_line(run(tmp_path, ENTRIES, images, "--prefix", prefix))

    assert "letters, digits" in line
    assert not (tmp_path / "out").exists()
