"""The own reader of shard files: what plain zarr reads, and a refusal of everything else."""

import errno
import json
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import zarr
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import stored_array
from shared.array_layout import ArrayLayout
from shared.batch_reads import BatchBuffers
from shared.cache import Cache, open_cache
from shared.encodings import decode
from shared.raw_chunks import RawChunks
from shared.store import put_array
from shared.stored_array import RowRead, StoredArray

AXES = ("query", "head", "vision")
compress = zstandard.ZstdCompressor().compress


def stored(folder: Path, values: npt.NDArray[Any]) -> StoredArray:
    """`values` as this project writes them, opened by its reader."""
    group = zarr.open_group(str(folder), mode="w", zarr_format=3)
    put_array(group, "a", values, AXES[: values.ndim])
    return opened(folder / "a")


def opened(folder: Path) -> StoredArray:
    metadata = (folder / "zarr.json").read_bytes()
    file = folder / ArrayLayout.parse(metadata).file
    return StoredArray.open(folder, metadata, file.stat().st_size if file.exists() else 0)


def rows(array: StoredArray, start: int, stop: int) -> npt.NDArray[Any]:
    out = np.full((stop - start, *array.layout.shape[1:]), 77, dtype=array.layout.dtype)
    array.read_into([RowRead(start, stop, flat(out))])
    return out


def flat(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return values.reshape(-1).view(np.uint8)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoredArray, npt.NDArray[Any]]:
    """An array of several chunks, the last of which is not full."""
    values = np.random.default_rng(0).integers(0, 9, (101, 40, 37), dtype=np.int32)
    array = stored(tmp_path_factory.mktemp("numbers"), values)
    assert array.layout.num_chunks > 4
    assert len(values) % array.layout.chunk_rows
    return array, values


@given(one=st.integers(0, 101), other=st.integers(0, 101))
def test_any_rows_are_those_that_were_written(
    numbers: tuple[StoredArray, npt.NDArray[Any]], one: int, other: int
) -> None:
    array, values = numbers
    start, stop = sorted((one, other))

    assert (rows(array, start, stop) == values[start:stop]).all()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoredArray, npt.NDArray[Any]]:
    """Bytes that zstd leaves as they are: chunks of one row, in three blocks (the last a byte)."""
    values = np.random.default_rng(0).integers(0, 256, (7, 2**18 + 1), dtype=np.uint8)
    array = stored(tmp_path_factory.mktemp("raw"), values)
    assert (np.diff(array.edges) == array.layout.chunk_bytes + 9 + 3 * 3 + 4).all()
    return array, values


@pytest.fixture(scope="module")
def raw_small(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoredArray, npt.NDArray[Any]]:
    """The same, several rows a chunk, the last chunk not full."""
    values = np.random.default_rng(0).integers(0, 256, (101, 40, 107), dtype=np.uint8)
    return stored(tmp_path_factory.mktemp("raw"), values), values


@given(one=st.integers(0, 101), other=st.integers(0, 101))
def test_rows_that_zstd_left_as_they_are_are_those_that_were_written(
    raw: tuple[StoredArray, npt.NDArray[Any]],
    raw_small: tuple[StoredArray, npt.NDArray[Any]],
    one: int,
    other: int,
) -> None:
    for array, values in (raw, raw_small):
        start, stop = sorted((one * len(values) // 101, other * len(values) // 101))

        assert (rows(array, start, stop) == values[start:stop]).all()


def with_flipped_bit(array: StoredArray, place: int, bit: int, folder: Path) -> StoredArray:
    """The same array, one bit of its file flipped: of the byte at `place`."""
    content = bytearray(array.path.read_bytes())
    content[place] ^= 1 << bit
    path = folder / "flipped"
    path.write_bytes(content)
    return StoredArray(path=path, layout=array.layout, edges=array.edges)


@settings(max_examples=25)
@given(place=st.integers(0, 2**18), bit=st.integers(0, 7))
def test_a_bit_that_flipped_is_found_also_where_zstd_left_bytes_as_they_are(
    raw: tuple[StoredArray, npt.NDArray[Any]],
    tmp_path_factory: pytest.TempPathFactory,
    place: int,
    bit: int,
) -> None:
    array, _ = raw
    begin, end = array.edges[3:5].tolist()
    place = begin + place * (end - begin) // 2**18 % (end - begin)
    flipped = with_flipped_bit(array, place, bit, tmp_path_factory.mktemp("flipped"))

    with pytest.raises(ValueError, match="checksum of chunk 3"):
        rows(flipped, 3, 4)
    rows(flipped, 4, 7)


def test_a_bit_that_flipped_around_the_blocks_of_a_chunk_is_found(
    raw: tuple[StoredArray, npt.NDArray[Any]], tmp_path: Path
) -> None:
    array, _ = raw
    begin, end = array.edges[3:5].tolist()
    places, at = [], begin
    for header, size in RawChunks.of(array.layout.chunk_bytes).blocks:
        places += range(at, at + len(header))
        at += len(header) + size
    places += range(at, end)
    assert len(places) == 9 + 3 * 3 + 4
    for place in places:
        flipped = with_flipped_bit(array, place, 0, tmp_path)

        with pytest.raises(ValueError, match="checksum of chunk 3"):
            rows(flipped, 3, 4)


@pytest.mark.parametrize(
    "size",
    [2**15, 2**16 + 255, 2**16 + 256, 2**17, 2**17 + 1, 2**18, 2**19, 2**19 + 1, 144 * 4096, 2**21],
)
def test_framing_is_told_as_zstd_writes_it(size: int) -> None:
    content = np.random.default_rng(0).bytes(size)

    raw = RawChunks.of(size)

    framing, rest = raw.framing, content
    frame = b""
    for header, block in raw.blocks:
        frame += header + rest[:block]
        framing, rest = framing.removeprefix(header), rest[block:]
    assert not framing
    assert not rest
    assert frame == zstandard.ZstdCompressor(-1).compress(content)


def test_a_frame_of_other_blocks_in_as_many_bytes_is_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (1, 2**17 + 100), dtype=np.uint8)
    written = stored(tmp_path, values)
    content = values.tobytes()
    frame = (
        b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", len(content))
        + (100 << 3).to_bytes(3, "little") + content[:100]
        + (2**17 << 3 | 1).to_bytes(3, "little") + content[100:]
    )  # fmt: skip
    written.path.write_bytes(shard(frame))

    array = opened(tmp_path / "a")

    assert (array.edges == written.edges).all()
    assert (rows(array, 0, 1) == values).all()


def test_a_small_frame_of_more_blocks_than_it_needs_is_read(
    forged: Callable[[bytes], StoredArray],
) -> None:
    """Two raw blocks where one would do."""
    values = np.random.default_rng(0).integers(0, 9, (3, 4, 6)).astype(np.float32)
    content = values.tobytes()
    frame = (
        b"\x28\xb5\x2f\xfd\x60" + struct.pack("<H", 288 - 256)
        + (100 << 3).to_bytes(3, "little") + content[:100]
        + (188 << 3 | 1).to_bytes(3, "little") + content[100:]
    )  # fmt: skip

    assert (rows(forged(shard(frame)), 0, 3) == values).all()


@pytest.mark.parametrize("limit", ["_MAX_PIECES", "_MAX_STORED"])
def test_rows_are_the_same_when_they_take_several_reads(
    numbers: tuple[StoredArray, npt.NDArray[Any]],
    raw: tuple[StoredArray, npt.NDArray[Any]],
    raw_small: tuple[StoredArray, npt.NDArray[Any]],
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
) -> None:
    monkeypatch.setattr(stored_array, limit, 3)
    for written, values in (numbers, raw, raw_small):
        array = opened(written.path.parents[values.ndim])  # again: the limit holds from then on
        last = len(values)
        for start, stop in ((0, last), (1, last - 1), (last // 2, last // 2 + 2)):
            assert (rows(array, start, stop) == values[start:stop]).all()


def test_chunks_far_larger_than_their_content_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty blocks in front make 460 bytes of a chunk of one."""
    array = stored(tmp_path, np.zeros((100, 1), dtype=np.uint8))
    metadata = json.loads((tmp_path / "a" / "zarr.json").read_text())
    metadata["codecs"][0]["configuration"]["chunk_shape"] = [1, 1]
    (tmp_path / "a" / "zarr.json").write_text(json.dumps(metadata))
    frame = b"\x28\xb5\x2f\xfd\x20\x01" + bytes(3 * 150) + (1 << 3 | 1).to_bytes(3, "little") + b"7"
    array.path.write_bytes(shard(*[frame] * 100))
    monkeypatch.setattr(stored_array, "_MAX_STORED", 2000)
    scratch = stored_array._Scratch()
    monkeypatch.setattr(stored_array, "_scratch", scratch)

    read = rows(opened(tmp_path / "a"), 0, 100)

    assert (read == ord("7")).all()
    assert len(scratch._memory) <= 2000


def test_a_file_that_will_not_wait_though_it_should_is_an_error(
    raw: tuple[StoredArray, npt.NDArray[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network mounts answer EAGAIN: the buffer holds nothing then."""
    array, values = raw

    def again(*_: object) -> int:
        raise BlockingIOError(errno.EAGAIN, "again")

    monkeypatch.setattr(os, "preadv", again)

    with pytest.raises(BlockingIOError):
        array.read_into([RowRead(0, 7, flat(np.zeros_like(values)))])


def cool(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing is in memory for who does not want to wait."""
    preadv = os.preadv

    def cold(descriptor: int, pieces: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError
        return preadv(descriptor, pieces, offset, flags)

    monkeypatch.setattr(os, "preadv", cold)


def test_rows_that_are_not_in_memory_are_asked_for_and_read_later(
    raw: tuple[StoredArray, npt.NDArray[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    array, values = raw
    asked, out = [], np.zeros_like(values)
    cool(monkeypatch)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *span: asked.append(span))

    late = array.read_into([RowRead(0, 7, flat(out))], wait=False)

    begin, end = array.edges[[0, -(-7 // array.layout.chunk_rows)]].tolist()
    assert [read[:2] for read in late] == [(0, 7)]
    assert asked == [(begin, end - begin, os.POSIX_FADV_WILLNEED)]
    array.read_into(late)
    assert (out == values).all()


@pytest.mark.parametrize("span", [(-1, 3), (5, 4), (100, 102), (2**62, 2**62)])
def test_rows_that_are_not_there_are_refused(
    numbers: tuple[StoredArray, npt.NDArray[Any]], span: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="of an array that has 101"):
        numbers[0].read_into([RowRead(*span, np.zeros(0, dtype=np.uint8))])


def test_rows_do_not_go_where_there_is_too_little_room(
    numbers: tuple[StoredArray, npt.NDArray[Any]],
) -> None:
    with pytest.raises(ValueError, match="3 bytes for rows 0 to 7 of 5920 each"):
        numbers[0].read_into([RowRead(0, 7, np.zeros(3, dtype=np.uint8))])


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "uint32", "int32", "int64", "float16", "float32"]
)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (1,), (5, 2), (3, 4, 6), (20000,)])
def test_every_type_and_shape_that_is_written_is_read(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    values = (np.arange(np.prod(shape)).reshape(shape) % 200).astype(dtype)
    array = stored(tmp_path, values)

    assert array.layout.shape == shape
    assert (rows(array, 0, len(values)) == values).all()


def change(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def edit(metadata: Any) -> None:
        for part in path[:-1]:
            metadata = metadata[part]
        metadata[path[-1]] = value

    return edit


SHARDING = ("codecs", 0, "configuration")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (change("shape", value=[2**40, 4, 6]), "larger than"),
        (change("shape", value=[3, 4, -6]), "expected 1 to 4 whole numbers"),
        (change("shape", value=[3, 4, 6.0]), "expected 1 to 4 whole numbers"),
        (change("shape", value="3"), "expected 1 to 4 whole numbers"),
        (change("shape", value=[True, 4, 6]), "expected 1 to 4 whole numbers"),
        (change("shape", value=[1] * 9), "expected 1 to 4 whole numbers"),
        (change(*SHARDING, "chunk_shape", value=[2**40, 4, 6]), "larger than"),
        (change(*SHARDING, "chunk_shape", value=[0, 4, 6]), "expected 1 to 4 whole numbers"),
        (change(*SHARDING, "chunk_shape", value=[3, 2, 6]), "whole rows"),
        (change("data_type", value="object"), "data_type is 'object'"),
        (change("data_type", value={"name": "struct"}), "data_type is"),
        (change("data_type", value="float64"), "data_type is 'float64'"),
        (change("codecs", value=[]), "not that of a sharded array"),
        (change("codecs", value=[{"name": "numcodecs.pickle"}]), "not that of a sharded array"),
        (change(*SHARDING, "codecs", 1, "name", value="numcodecs.pickle"), "differs"),
        (change(*SHARDING, "codecs", value=[{"name": "bytes"}]), "not that of a sharded array"),
        (change(*SHARDING, "codecs", 1, "configuration", "level", value="3"), "differs"),
        (change(*SHARDING, "index_location", value="end"), "differs"),
        (change("fill_value", value=1), "differs"),
        (change("attributes", value={"more": 1}), "differs"),
        (change("storage_transformers", value=[{"name": "x"}]), "differs"),
        (change("chunk_key_encoding", "configuration", "separator", value="."), "differs"),
    ],
)
def test_metadata_of_any_other_array_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], reason: str
) -> None:
    stored(tmp_path, np.zeros((3, 4, 6), dtype=np.float32))
    path = tmp_path / "a" / "zarr.json"
    metadata = json.loads(path.read_text())
    edit(metadata)
    path.write_text(json.dumps(metadata))

    with pytest.raises(ValueError, match=reason):
        opened(tmp_path / "a")


def shard(*chunks: bytes, index: list[tuple[int, int]] | None = None) -> bytes:
    """A shard file of these chunks, each with a true checksum, and by default a true index."""
    sealed = [chunk + struct.pack("<I", google_crc32c.value(chunk)) for chunk in chunks]
    begin, entries = 16 * len(sealed) + 4, []
    for chunk in sealed:
        entries.append((begin, len(chunk)))
        begin += len(chunk)
    table = b"".join(struct.pack("<QQ", *entry) for entry in index or entries)
    return table + struct.pack("<I", google_crc32c.value(table)) + b"".join(sealed)


@pytest.fixture
def forged(tmp_path: Path) -> Callable[[bytes], StoredArray]:
    """Opens an array [3, 4, 6] of float32 (288 bytes, one chunk) with another shard file."""

    def open_forged(content: bytes) -> StoredArray:
        array = stored(tmp_path, np.zeros((3, 4, 6), dtype=np.float32))
        array.path.write_bytes(content)
        return opened(tmp_path / "a")

    return open_forged


def test_a_forged_shard_file_with_true_contents_is_read(
    forged: Callable[[bytes], StoredArray],
) -> None:
    """So that the refusals below are for what they say."""
    values = np.arange(72, dtype=np.float32).reshape(3, 4, 6)

    array = forged(shard(compress(values.tobytes())))

    assert (rows(array, 0, 3) == values).all()


@pytest.mark.parametrize("size", [0, 287, 289, 2**34])
def test_a_chunk_that_inflates_to_another_size_is_refused(
    forged: Callable[[bytes], StoredArray], size: int
) -> None:
    frame = compress(bytes(min(size, 2**20)))
    if size > 2**20:  # a header that promises 16 GiB: 8 bytes of content size
        frame = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + frame[9:]

    with pytest.raises(ValueError, match=rf"inflates to {size} bytes, expected 288"):
        rows(forged(shard(frame)), 0, 3)


@pytest.mark.parametrize(
    "frame", [b"", b"\x80\x04N.", b"\x28\xb5\x2f\xfd\x00\x58" + bytes(30), bytes(200)]
)
def test_a_chunk_that_is_no_zstd_frame_is_refused(
    forged: Callable[[bytes], StoredArray], frame: bytes
) -> None:
    with pytest.raises(ValueError, match=r"unknown number|determining|empty chunk"):
        rows(forged(shard(frame)), 0, 3)


def test_a_frame_with_damage_under_a_true_checksum_is_refused(
    forged: Callable[[bytes], StoredArray],
) -> None:
    frame = bytearray(compress(np.random.default_rng(0).bytes(288)))
    del frame[-5:]

    with pytest.raises(ValueError, match="cannot be inflated"):
        rows(forged(shard(bytes(frame))), 0, 3)


@pytest.mark.parametrize(
    "entry", [(0, 30), (20, 2**63), (2**64 - 1, 2**64 - 1), (20, 0), (2**40, 40), (19, 40)]
)
def test_an_index_that_leads_elsewhere_is_refused(
    forged: Callable[[bytes], StoredArray], entry: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="the index"):
        forged(shard(compress(bytes(288)), index=[entry]))


def test_a_chunk_far_larger_than_its_content_is_refused_before_memory_is_taken(
    forged: Callable[[bytes], StoredArray], tmp_path: Path
) -> None:
    index = shard(b"", index=[(20, 2**40)])[:20]
    array = forged(shard(compress(bytes(288))))
    array.path.write_bytes(index)
    os.truncate(array.path, 20 + 2**40)

    with pytest.raises(ValueError, match=r"a chunk of 1099511627776 bytes, at most 802 for 288"):
        opened(tmp_path / "a")


def test_two_chunks_in_one_place_are_refused(tmp_path: Path) -> None:
    values = np.zeros((300, 16, 16), dtype=np.float32)
    array = stored(tmp_path, values)
    frame = compress(bytes(array.layout.chunk_rows * array.layout.row_bytes))
    size = len(frame) + 4
    begin = 16 * array.layout.num_chunks + 4
    index = [(begin, size)] * array.layout.num_chunks
    table = b"".join(struct.pack("<QQ", *entry) for entry in index)
    array.path.write_bytes(
        table + struct.pack("<I", google_crc32c.value(table)) + frame
        + struct.pack("<I", google_crc32c.value(frame))
    )  # fmt: skip

    with pytest.raises(ValueError, match="one chunk after another"):
        opened(tmp_path / "a")


def test_a_batch_is_its_samples_padded_in_order(cache: Cache) -> None:
    keys = [key for key in cache.keys() if cache.read(key).vision_start is not None]  # noqa: SIM118
    batch = cache.read_batch(keys[::-1])

    for number, key in enumerate(keys[::-1]):
        alone = cache.read(key)
        attention = decode("float32", batch.attention[0])[number].swapaxes(0, 1)
        own = alone.attention[0].shape[1]
        assert (attention[:, :own] == alone.attention[0]).all()
        assert (attention[:, own:] == 0).all()
        assert (decode("float32", batch.vision_tokens)[number] == alone.vision_tokens).all()
        assert (batch.input_ids[number] == alone.input_ids).all()
    expected = np.concatenate([cache.read(key).top_ids for key in keys[::-1]])
    assert batch.top_ids is not None
    assert (batch.top_ids == expected).all()


def test_a_sample_that_stands_twice_in_a_batch_is_given_twice(cache: Cache) -> None:
    """Its image is read once."""
    key = next(key for key in cache.keys() if cache.read(key).vision_start is not None)  # noqa: SIM118
    other = next(one for one in cache.keys() if one != key)  # noqa: SIM118

    batch = cache.read_batch([key, other, key])

    alone = cache.read(key)
    vision = decode("float32", batch.vision_tokens)
    assert (vision[0] == alone.vision_tokens).all()
    assert (vision[-1] == alone.vision_tokens).all()
    assert (batch.input_ids[2] == alone.input_ids).all()


def test_signals_that_are_not_asked_for_are_not_read(cache: Cache) -> None:
    batch = cache.read_batch(cache.keys(), signals=())

    assert not batch.attention
    assert not batch.vision_tokens
    assert batch.top_ids is None


def test_a_signal_of_another_name_is_refused(cache_path: Path) -> None:
    # In a process of its own: here the types of arguments are checked, for users they are not.
    program = (
        f"import shared.cache as c; c.open_cache({str(cache_path)!r}).read_batch([], ['attn'])"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert "ValueError: signals ['attn'], expected some of" in done.stderr


def digest(cache: Cache, key: str) -> int:
    found = cache.read(key)
    parts = [found.input_ids, found.labels, found.top_ids, found.top_logprobs]
    return hash(tuple(part.tobytes() for part in parts if part is not None))


def test_threads_read_one_cache_at_once(cache_path: Path) -> None:
    cache = open_cache(cache_path)
    keys = cache.keys() * 20
    expected = [digest(open_cache(cache_path), key) for key in keys]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda key: digest(cache, key), keys)) == expected


def _sums(cache: Cache) -> list[int]:
    return [int(cache.read(key).input_ids.sum()) for key in cache.keys()]  # noqa: SIM118


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_a_cache_that_was_opened_before_they_were(
    cache_path: Path, method: str
) -> None:
    cache = open_cache(cache_path)
    expected = _sums(cache)

    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_sums, [cache] * 4) == [expected] * 4


def test_a_pickled_cache_finds_its_keys(cache: Cache) -> None:
    again = pickle.loads(pickle.dumps(cache))

    assert again.keys() == cache.keys()
    assert all(key in again for key in cache.keys())  # noqa: SIM118
    assert "nowhere" not in again


def test_buffers_that_are_used_again_give_the_same_batches(cache: Cache) -> None:
    buffers, keys = BatchBuffers(), cache.keys()
    for chosen in (keys, keys[:1], keys[::-1], keys[1:]):
        fresh, used = cache.read_batch(chosen), cache.read_batch(chosen, buffers=buffers)

        assert used.attention.keys() == fresh.attention.keys()
        for layer, parts in fresh.attention.items():
            for suffix, stored_ in parts.items():
                np.testing.assert_array_equal(used.attention[layer][suffix], stored_)
        np.testing.assert_array_equal(used.top_ids, fresh.top_ids)


def test_a_batch_of_which_nothing_is_in_memory_is_read_later_and_whole(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cache.read_batch(cache.keys())
    cool(monkeypatch)

    found = cache.read_batch(cache.keys())

    for one, other in zip(found.input_ids, expected.input_ids, strict=True):
        np.testing.assert_array_equal(one, other)
    for suffix, stored in expected.vision_tokens.items():
        np.testing.assert_array_equal(found.vision_tokens[suffix], stored)
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)


def test_sequences_stay_when_the_next_batch_is_read_into_the_same_memory(cache: Cache) -> None:
    buffers, keys = BatchBuffers(), cache.keys()
    first = cache.read_batch(keys, buffers=buffers)
    before = [ids.copy() for ids in first.input_ids]

    cache.read_batch(keys[::-1], buffers=buffers)

    for ids, same in zip(first.input_ids, before, strict=True):
        np.testing.assert_array_equal(ids, same)
