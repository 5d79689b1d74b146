"""Reading, teacher and writing overlap; what is stored and what is raised does not show it."""

import errno
import itertools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_builder.ahead import Ahead
from cache_builder.arrays import ShardArrays
from cache_builder.build import Builder, build_cache
from cache_builder.prepare import batches_by_length, image_batches, prepare
from shared.cache import open_cache
from shared.errors import CacheError, InputError
from shared.samples import index_tar
from shared.spec import CacheSpec
from shared.tokenizer import Tokenizer
from tests.support import (
    ALIGN_ONLY,
    FULL,
    annotation,
    build,
    builder,
    png,
    record,
    sample,
    skipped,
    stored_digests,
    text_sample,
    write_tar,
)


def count_tower(loaded: Builder) -> list[int]:
    """Images of every forward pass of the vision tower, as they come."""
    counts: list[int] = []
    tower: torch.nn.Module = loaded.teacher._model.tower
    tower.register_forward_pre_hook(
        lambda _module, _args, kwargs: counts.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    return counts


def conversations(seed: int, images: int, each: int) -> list[Any]:
    """`each` conversations of different lengths about each of `images` images."""
    return [
        sample(f"{seed}-{n}-{k}", annotation("<image>\n" + "what " * (3 * k + n), "red"), png(n))
        for k, n in itertools.product(range(each), range(images))
    ]


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    """Three tars of three samples."""
    return [
        write_tar(
            tmp_path / f"t-{n}.tar",
            sample(f"a{n}", image=png(n)), text_sample(f"b{n}"), sample(f"c{n}", image=png(9)),
        )
        for n in range(3)
    ]  # fmt: skip


# Once per distinct image


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_tower_runs_once_for_every_distinct_image_of_a_tar(
    tmp_path: Path, batch_size: int
) -> None:
    tar = write_tar(tmp_path / "t.tar", *conversations(0, images=6, each=5), text_sample("text"))
    loaded = builder(FULL, batch_size=batch_size)
    counts = count_tower(loaded)

    build_cache(loaded, [tar], tmp_path / "cache")

    assert sum(counts) == 6
    assert len(counts) == -(-6 // batch_size)  # in full batches
    assert len(open_cache(tmp_path / "cache")) == 31


def test_images_that_cannot_be_used_never_reach_the_tower(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("a"), sample("b", image=png(1)[:-200]))
    loaded = builder(FULL)
    counts = count_tower(loaded)

    build_cache(loaded, [tar], tmp_path / "cache")

    assert counts == [1]


def test_a_batch_whose_images_are_all_broken_is_skipped_whole(tmp_path: Path) -> None:
    broken = [sample(f"bad-{n}", image=png(n)[:-200]) for n in range(3)]
    tar = write_tar(tmp_path / "t.tar", *broken, sample("good", annotation("<image>\nwhy " * 1)))

    build(tmp_path / "cache", tar, FULL, batch_size=1)

    assert set(skipped(tmp_path / "cache", "t")) == {"bad-0", "bad-1", "bad-2"}
    assert open_cache(tmp_path / "cache").keys() == ["good"]


def test_batches_are_of_similar_length_and_their_images_come_in_the_order_of_need(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tar = write_tar(tmp_path / "t.tar", *conversations(0, images=3, each=4), text_sample("text"))
    samples: list[Any] = list(prepare(index_tar(tar), CacheSpec.from_dict(FULL), tokenizer))

    batches = batches_by_length(samples, 4)

    lengths = [item.num_tokens for batch in batches for item in batch]
    assert lengths == sorted(lengths)
    assert [len(batch) for batch in batches] == [4, 4, 4, 1]
    needed = [item.image_digest for batch in batches for item in batch if item.image_digest]
    flat = [digest for images in image_batches(batches, 2) for digest in images]
    assert flat == list(dict.fromkeys(needed))


# Order, errors


def test_shards_are_committed_in_the_order_of_the_tars(tmp_path: Path, tars: list[Path]) -> None:
    build(tmp_path / "cache", tars)

    times = [(tmp_path / "cache" / "records" / f"t-{n}.json").stat().st_mtime_ns for n in range(3)]
    assert times == sorted(times)


def test_at_most_one_shard_is_being_written(tmp_path: Path, tars: list[Path]) -> None:
    loaded = builder(ALIGN_ONLY)
    begun: list[int] = []
    tower: torch.nn.Module = loaded.teacher._model.tower
    out = tmp_path / "cache"

    def look(*_: Any) -> None:
        begun.append(len(list(out.glob("data/*"))) - len(list(out.glob("records/*.json"))))

    tower.register_forward_pre_hook(look)
    build_cache(loaded, tars, out)

    assert max(begun) <= 1


def test_an_overlapped_build_has_the_bytes_of_builds_of_one_tar_each(
    tmp_path: Path, tars: list[Path]
) -> None:
    build(tmp_path / "all", tars)
    for tar in tars:
        build(tmp_path / "each", tar)

    assert stored_digests(tmp_path / "all") == stored_digests(tmp_path / "each")


def test_a_tar_that_breaks_while_the_build_runs_stops_it_after_the_tars_before(
    tmp_path: Path, tars: list[Path]
) -> None:
    loaded = builder(ALIGN_ONLY)
    tower: torch.nn.Module = loaded.teacher._model.tower

    # The first run is of tar 0; tar 2 is not read before tar 1's turn.
    def lose(*_: Any) -> None:
        tars[2].unlink(missing_ok=True)

    tower.register_forward_pre_hook(lose)
    with pytest.raises(InputError, match=r"t-2\.tar: cannot be read"):
        build_cache(loaded, tars, tmp_path / "cache")

    assert list(stored_digests(tmp_path / "cache")) == ["t-0", "t-1"]
    assert not [t for t in threading.enumerate() if t.name.startswith(("read", "image", "write"))]


def test_an_error_of_the_teacher_lets_the_shard_before_be_finished(
    tmp_path: Path, tars: list[Path]
) -> None:
    loaded = builder(ALIGN_ONLY)
    runs = itertools.count()
    tower: torch.nn.Module = loaded.teacher._model.tower

    def fail(*_: Any) -> None:
        if next(runs) == 1:
            raise MemoryError("of the device")

    tower.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="of the device"):
        build_cache(loaded, tars, tmp_path / "cache")

    assert list(stored_digests(tmp_path / "cache")) == ["t-0"]
    assert build(tmp_path / "cache", tars, ALIGN_ONLY).built == 2


def test_an_error_of_the_writer_stops_the_build_with_its_own_message(
    tmp_path: Path, tars: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_descriptor: int) -> None:
        if list(tmp_path.glob("cache/data/t-1-*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(CacheError, match="shard t-1 cannot be written"):
            build(tmp_path / "cache", tars, ALIGN_ONLY)

    assert list(stored_digests(tmp_path / "cache")) == ["t-0"]
    assert build(tmp_path / "cache", tars, ALIGN_ONLY).built == 2


def test_a_key_that_is_also_an_images_digest_is_not_mistaken_for_it(tmp_path: Path) -> None:
    """Data sets name samples by the hash of their image."""
    import hashlib

    image = png(3)
    digest = hashlib.sha256(image).hexdigest()
    tar = write_tar(
        tmp_path / "t.tar", sample("other", image=image), sample(digest, image=image),
        sample("bad", image=b""),
    )  # fmt: skip

    build(tmp_path / "cache", tar)

    assert open_cache(tmp_path / "cache").keys() == ["other", digest]
    assert record(tmp_path / "cache", "t").images == (0, 0)


# Parts


def test_results_come_in_order_and_never_more_than_depth_are_waiting() -> None:
    done: list[int] = []

    def work(number: int) -> int:
        time.sleep(0.01 if number % 2 else 0)
        done.append(number)
        return number * number

    with ThreadPoolExecutor(3) as pool:
        found = Ahead(work, range(20), pool, depth=3)
        for number in range(20):
            assert next(found) == number * number
            assert len(done) <= number + 1 + 3
        assert list(found) == []


def test_just_as_many_items_are_taken_as_may_be_waiting() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(9):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        found = Ahead(lambda number: number, items(), pool, depth=3)
        counts = [len(taken)]
        for _ in found:
            counts.append(len(taken))

    assert counts == [3, 4, 5, 6, 7, 8, 9, 9, 9, 9]


def test_an_exception_comes_where_its_result_would_have_come() -> None:
    with ThreadPoolExecutor(2) as pool:
        found = Ahead(lambda n: 1 // (n - 2), [0, 1, 2, 3], pool, depth=4)

        assert [next(found), next(found)] == [-1, -1]
        with pytest.raises(ZeroDivisionError):
            next(found)


def rows(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)[:, None].repeat(1, 2)


def test_rows_land_in_the_tars_order_whatever_the_batches_were() -> None:
    arrays = ShardArrays({"query": {"a": 2, "text": 0, "b": 1, "c": 3}})
    arrays.put("x", ("query", "vision"), ["c", "a"], rows(5, 6, 7, 1, 2))
    arrays.put("x", ("query", "vision"), ["b", "text"], rows(3))

    taken = arrays.take({"query": {"a", "text", "b", "c"}})["x"]

    assert taken.axes == ("query", "vision")
    np.testing.assert_array_equal(taken.values[:, 1], [1, 2, 3, 5, 6, 7])
    assert taken.values.dtype == np.uint8


def test_rows_of_an_owner_that_is_not_kept_are_left_out() -> None:
    arrays = ShardArrays({"query": {"a": 2, "b": 1, "c": 3}})
    arrays.put("x", ("query", "vision"), ["a", "c"], rows(1, 2, 5, 6, 7))

    np.testing.assert_array_equal(arrays.take({"query": {"a"}})["x"].values[:, 0], [1, 2])
    assert arrays.take({"query": set()}) == {}


def test_shards_that_another_build_committed_meanwhile_count_as_present(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"t-{n}.tar", sample(f"a{n}")) for n in range(3)]
    out, one = tmp_path / "cache", builder(ALIGN_ONLY)

    def other(*_: object) -> None:
        if not out.joinpath("records").exists():
            assert build(out, tars[1:], ALIGN_ONLY).built == 2

    one.teacher._model.tower.register_forward_pre_hook(other)
    report = build_cache(one, tars, out)

    assert (report.built, report.present, report.samples, report.left) == (1, 2, 1, 0)
