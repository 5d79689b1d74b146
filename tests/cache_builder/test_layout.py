"""What lies on disk: plain Zarr v3 that any reader opens without our code."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from shared.cache import Cache, open_cache
from shared.store import put_array
from tests.support import FULL, annotation, build, png, record, sample, text_sample, write_tar

TOP_8 = {**FULL, "logprobs": {"top_k": 8, "encoding": "float16"}}
AXES = {
    "input_ids": ["token"],
    "labels": ["token"],
    "token_offsets": ["boundary"],
    "vision_tokens": ["image", "vision", "channel"],
    "image_sha256": ["image", "byte"],
    "attention_0": ["query", "head", "vision"],
    "query_offsets": ["boundary"],
    "top_ids": ["response", "top"],
    "top_logprobs": ["response", "top"],
    "rest_logprobs": ["response"],
    "response_offsets": ["boundary"],
    "probe_annotation": ["byte"],
    "probe_annotation_offsets": ["boundary"],
    "probe_image": ["byte"],
    "probe_image_offsets": ["boundary"],
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three conversations about one image, one about another, and one without."""
    folder = tmp_path_factory.mktemp("layout")
    shared, other = png(1), png(2)
    tar = write_tar(
        folder / "t.tar",
        sample("a", annotation("<image>\nwhat", "red"), shared),
        text_sample("text"),
        sample("b", annotation("<image>\nwhy is the boat there", "so"), shared),
        sample("c", annotation("<image>\nwhere", "left of the boat"), other),
        sample("d", annotation("who is\n<image>", "no"), shared),
    )
    build(folder / "cache", tar, TOP_8)
    return folder / "cache"


@pytest.fixture
def group(out: Path) -> zarr.Group:
    """The data, opened by plain zarr-python from what the record says."""
    values = json.loads((out / "records" / "t.json").read_text())
    return zarr.open_group(str(out / values["data"]), mode="r")


@pytest.mark.parametrize(
    ("name", "row", "rows"),
    [
        ("attention_0", (32, 108), 18),  # 62 kB
        ("attention_0__scale", (32,), 512),  # 16 kB
        ("vision_tokens", (144, 3072), 1),
        ("vision_tokens__low", (4096,), 4),
        ("input_ids", (), 16384),
    ],
)
def test_a_chunk_is_of_64_kib_or_beside_a_signal_of_16(
    tmp_path: Path, name: str, row: tuple[int, ...], rows: int
) -> None:
    group = zarr.open_group(str(tmp_path), mode="w", zarr_format=3)

    put_array(group, name, np.zeros((2 * rows, *row), np.uint8), ("a", "b", "c")[: 1 + len(row)])

    (array,) = (array for _, array in group.arrays())
    assert array.chunks == (rows, *row)


def metadata(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (out / record(out, "t").data / name / "zarr.json").read_text()
    )
    return found


def test_arrays_and_their_axes_are_those_of_the_glossary(out: Path, group: zarr.Group) -> None:
    assert {name: metadata(out, name)["dimension_names"] for name in group.array_keys()} == AXES


@pytest.mark.parametrize("name", AXES)
def test_an_array_is_one_zarr_v3_shard_with_checksums(out: Path, name: str) -> None:
    found = metadata(out, name)
    (sharding,) = found["codecs"]
    files = [file for file in record(out, "t").files if file.startswith(f"{name}/c")]

    assert found["zarr_format"] == 3
    assert len(files) == 1
    assert sharding["name"] == "sharding_indexed"
    assert sharding["configuration"]["index_location"] == "start"
    inner = [codec["name"] for codec in sharding["configuration"]["codecs"]]
    assert inner == ["bytes", "zstd", "crc32c"]
    index = [codec["name"] for codec in sharding["configuration"]["index_codecs"]]
    assert index == ["bytes", "crc32c"]


def test_types_are_those_of_the_encodings(group: zarr.Group) -> None:
    types = {name: array.dtype for name, array in group.arrays()}

    assert types["attention_0"] == types["vision_tokens"] == np.float32
    assert types["top_logprobs"] == np.float16
    assert types["rest_logprobs"] == np.float32
    assert types["input_ids"] == types["labels"] == np.int32
    assert types["top_ids"] == np.uint16  # 512 tokens
    assert {types[name] for name in types if name.endswith("_offsets")} == {np.dtype(np.int64)}


def test_plain_zarr_reads_what_the_reading_api_reads(out: Path, group: zarr.Group) -> None:
    cache = open_cache(out)
    for row, key in enumerate(cache.keys()):
        found = cache.read(key)
        tokens, queries, responses = (
            slice(*group[f"{name}_offsets"][row : row + 2].tolist())
            for name in ("token", "query", "response")
        )
        np.testing.assert_array_equal(group["input_ids"][tokens], found.input_ids)
        np.testing.assert_array_equal(group["labels"][tokens], found.labels)
        np.testing.assert_array_equal(group["top_ids"][responses], found.top_ids)
        np.testing.assert_array_equal(group["rest_logprobs"][responses], found.rest_logprobs)
        if found.vision_start is not None:
            rows = group["attention_0"][queries]
            np.testing.assert_array_equal(rows.swapaxes(0, 1), found.attention[0])
            image = record(out, "t").images[row]
            np.testing.assert_array_equal(group["vision_tokens"][image], found.vision_tokens)
        else:
            assert queries.start == queries.stop
            assert record(out, "t").images[row] == -1


def test_distinct_images_are_stored_once(out: Path, group: zarr.Group) -> None:
    assert group["vision_tokens"].shape == (2, 144, 64)
    assert record(out, "t").images == (0, -1, 0, 1, 0)


def test_conversations_about_one_image_read_equal_vision_tokens(out: Path) -> None:
    tokens = {key: open_cache(out).read(key).vision_tokens for key in "abcd"}

    np.testing.assert_array_equal(tokens["a"], tokens["b"])
    np.testing.assert_array_equal(tokens["a"], tokens["d"])
    assert not np.allclose(tokens["a"], tokens["c"])


def test_rows_are_those_after_the_image_and_sum_to_at_most_one(out: Path) -> None:
    cache = open_cache(out)
    for key in "abcd":
        found = cache.read(key)
        assert found.vision_start is not None
        rows = len(found.input_ids) - found.vision_start - 1
        assert found.attention[0].shape == (4, rows, 144)
        assert (found.attention[0] >= 0).all()
        mass = found.attention[0].sum(axis=-1)
        assert (mass <= 1 + 1e-6).all()
        assert mass.min() < 0.9  # text is looked at too


def test_kept_and_rest_probability_add_up_to_one(out: Path) -> None:
    for key in open_cache(out).keys():  # noqa: SIM118  (a Cache is not a dict)
        found = open_cache(out).read(key)
        assert found.top_logprobs is not None
        assert found.rest_logprobs is not None
        assert found.top_logprobs.shape == (int((found.labels[1:] != -100).sum()), 8)
        mass = np.exp(found.top_logprobs).sum(axis=-1) + np.exp(found.rest_logprobs)
        np.testing.assert_allclose(mass, 1, atol=2e-3)  # float16


def test_every_file_is_in_the_record_with_its_size_and_digest(out: Path) -> None:
    import hashlib

    found = record(out, "t")
    folder = out / found.data
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}

    assert set(files) == set(found.files)
    for name, path in files.items():
        content = path.read_bytes()
        assert found.files[name].size == len(content)
        assert found.files[name].sha256 == hashlib.sha256(content).hexdigest()


def test_only_records_data_and_plans_lie_in_a_cache(out: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == ["data", "plans", "records"]
    assert not list(out.rglob("*.partial"))


def test_lengths_and_images_come_from_the_record_alone(out: Path) -> None:
    cache = open_cache(out)

    assert cache.with_image.tolist() == [True, False, True, True, True]
    ids = [len(cache.read(key).input_ids) for key in list(cache.keys())]
    assert (cache.lengths == np.array(ids) + 143 * cache.with_image).all()


# Shards without some signal


def built(tmp_path: Path, *samples: Any) -> Cache:
    build(tmp_path / "cache", write_tar(tmp_path / "t.tar", *samples), FULL)
    return open_cache(tmp_path / "cache")


def test_a_shard_of_text_only_samples(tmp_path: Path) -> None:
    cache = built(tmp_path, text_sample("a"), text_sample("b", "why", "so it is"))

    assert len(cache) == 2
    for key in "ab":
        found = cache.read(key)
        assert found.attention == {}
        assert found.vision_tokens is found.vision_start is None
        assert found.top_ids is not None
        assert len(found.top_ids) == (found.labels[1:] != -100).sum()


def test_a_shard_in_which_every_sample_is_skipped(tmp_path: Path) -> None:
    cache = built(tmp_path, sample("a", image=b""), sample("b", b"not JSON"))

    assert len(cache) == 0
    assert cache.keys() == []
    assert "a" not in cache
    assert [skip.key for skip in cache.records["t"].skipped] == ["b", "a"]


def test_a_shard_without_samples_beside_one_with_samples(tmp_path: Path) -> None:
    tars = [
        write_tar(tmp_path / "a.tar", sample("a", image=b"")),
        write_tar(tmp_path / "b.tar", sample("b")),
    ]
    build(tmp_path / "cache", tars)

    assert open_cache(tmp_path / "cache").keys() == ["b"]
    assert open_cache(tmp_path / "cache").read("b").attention[0].size


@pytest.mark.parametrize("signal", ["attention", "vision_tokens", "logprobs"])
def test_one_signal_can_be_stored_alone(tmp_path: Path, signal: str) -> None:
    spec = {"template": "v1", "image_aspect": "pad", signal: FULL[signal]}
    tar = write_tar(tmp_path / "t.tar", sample("image"), text_sample("text"))
    build(tmp_path / "cache", tar, spec)
    build(tmp_path / "full", tar, FULL)

    found, full = (open_cache(tmp_path / name).read("image") for name in ("cache", "full"))

    for name, values in {
        "attention": (found.attention.get(0), full.attention[0]),
        "vision_tokens": (found.vision_tokens, full.vision_tokens),
        "logprobs": (found.top_logprobs, full.top_logprobs),
    }.items():
        if name == signal:
            np.testing.assert_array_equal(*values)
        else:
            assert values[0] is None
