"""Reading a cache: any order, honest errors, no torch."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from shared.cache import Cache, open_cache
from shared.errors import CacheError, DamagedError, MismatchError
from tests.support import denied, edit_record, record


@pytest.fixture
def copied(cache_path: Path, tmp_path: Path) -> Path:
    """A copy of the reference cache, to be damaged."""
    shutil.copytree(cache_path, tmp_path / "cache")
    return tmp_path / "cache"


def chunk_file(root: Path, shard: str, array: str) -> Path:
    found = record(root, shard)
    (name,) = (file for file in found.files if file.startswith(f"{array}/c"))
    return root / found.data / name


def read_all(root: Path) -> None:
    cache = open_cache(root)
    for key in cache.keys():  # noqa: SIM118  (a Cache is not a dict)
        cache.read(key)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_cache_lists_its_samples_shard_by_shard(cache: Cache) -> None:
    assert cache.keys() == ["s0", "s1", "s2", "text0"]
    assert len(cache) == 4
    assert "s1" in cache
    assert "boat" not in cache
    assert cache.spec.template == "v1"


def test_samples_read_the_same_in_any_order(cache: Cache, cache_path: Path) -> None:
    forth = {key: cache.read(key) for key in cache.keys()}  # noqa: SIM118
    again = open_cache(cache_path)
    back = {key: again.read(key) for key in reversed(again.keys())}

    for key, found in forth.items():
        for field in fields(found):
            if field.name != "attention":
                one, other = (getattr(sample, field.name) for sample in (found, back[key]))
                np.testing.assert_array_equal(one, other, err_msg=field.name)
        assert found.attention.keys() == back[key].attention.keys()
        for layer, weights in found.attention.items():
            np.testing.assert_array_equal(weights, back[key].attention[layer])


def test_a_key_that_is_not_there_is_named(cache: Cache) -> None:
    with pytest.raises(KeyError, match="no sample 'boat'"):
        cache.read("boat")


def test_a_cache_can_be_pickled_for_workers(cache: Cache) -> None:
    import pickle

    cache.read("s0")

    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(cache)).read("s1").input_ids, cache.read("s1").input_ids
    )


def test_reading_a_cache_imports_no_torch(cache_path: Path) -> None:
    program = (
        "import sys; from shared.cache import open_cache; "
        f"cache = open_cache({str(cache_path)!r}); cache.read('s0'); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_no_cache_is_a_clear_error(tmp_path: Path, where: str) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(CacheError, match="no cache here"):
        open_cache(tmp_path / where)


ARRAYS = (
    "input_ids", "labels", "token_offsets", "attention_0", "vision_tokens",
    "top_ids", "top_logprobs", "query_offsets", "response_offsets", "image_sha256",
)  # fmt: skip


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("place", [0, 0.5, 0.999])
def test_a_flipped_bit_is_found_when_read_and_shard_and_array_are_named(
    copied: Path, array: str, place: float
) -> None:
    path = chunk_file(copied, "ref-000001", array)
    flip(path, int(place * path.stat().st_size))

    with pytest.raises(DamagedError, match=rf"shard ref-000001: {array}") as error:
        read_all(copied)

    assert "run build-cache on ref-000001.tar again" in str(error.value)


def test_a_changed_shape_is_found_though_the_size_is_the_same(copied: Path) -> None:
    path = copied / record(copied, "ref-000000").data / "attention_0" / "zarr.json"
    text = path.read_text()
    rows = json.loads(text)["shape"][0]
    path.write_text(text.replace(f"{rows},", f"{rows + 1},", 1))
    assert path.read_text() != text

    with pytest.raises(DamagedError, match=r"attention_0: zarr\.json has sha256"):
        read_all(copied)


def test_damage_in_one_shard_leaves_the_others_readable(copied: Path) -> None:
    flip(chunk_file(copied, "ref-000001", "attention_0"), -1)

    cache = open_cache(copied)

    cache.read("s0")
    with pytest.raises(DamagedError):
        cache.read("s2")


def test_a_missing_file_is_found_not_read_as_zeros(copied: Path) -> None:
    chunk_file(copied, "ref-000000", "attention_0").unlink()

    with pytest.raises(DamagedError, match=r"ref-000000: attention_0/c/0/0/0 is missing"):
        read_all(copied)


def test_a_file_that_was_cut_is_found(copied: Path) -> None:
    path = chunk_file(copied, "ref-000000", "attention_0")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(DamagedError, match=f"is {size - 1} bytes, its record says {size} bytes"):
        read_all(copied)


def test_a_missing_data_folder_is_found(copied: Path) -> None:
    shutil.rmtree(copied / record(copied, "ref-000000").data)

    with pytest.raises(DamagedError, match="is missing"):
        read_all(copied)


def test_a_file_that_vanishes_while_the_cache_is_open_is_an_error(copied: Path) -> None:
    cache = open_cache(copied)
    cache.read("s0")
    shutil.rmtree(copied / record(copied, "ref-000000").data)

    with pytest.raises(DamagedError, match="shard ref-000000"):
        cache.read("s1")


@pytest.mark.parametrize("part", ["", "labels", "labels/c/0"])
def test_what_may_not_be_read_is_not_called_damaged(copied: Path, part: str) -> None:
    cache = open_cache(copied)

    with (
        denied(copied / record(copied, "ref-000000").data / part),
        pytest.raises(CacheError, match=r"cannot be read \(Permission denied\)") as found,
    ):
        cache.read("s0")

    assert not isinstance(found.value, DamagedError)


def test_files_beside_the_records_do_not_matter(copied: Path) -> None:
    (copied / "records" / "ref-000000.json.1234abcd.partial").write_text("{half")
    (copied / "data" / "ref-000000-00000000").mkdir()

    assert len(open_cache(copied)) == 4


@pytest.mark.parametrize("text", ["", "{half", "[]", "5", "[" * 100_000])
def test_a_record_that_is_no_record_is_named(copied: Path, text: str) -> None:
    (copied / "records" / "ref-000000.json").write_text(text)

    with pytest.raises(DamagedError, match=r"ref-000000\.json: not a record of format 1"):
        open_cache(copied)


def test_one_key_in_two_shards_is_refused(copied: Path) -> None:
    edit_record(copied, "ref-000001", lambda values: values.update(keys=["s0", "text0"], probe=[]))

    with pytest.raises(MismatchError, match="'s0' stands in shard ref-000000 and in ref-000001"):
        open_cache(copied)


def test_a_spec_with_a_key_from_the_future_is_refused(copied: Path) -> None:
    for shard in ("ref-000000", "ref-000001"):
        edit_record(copied, shard, lambda values: values["identity"]["spec"].update(future=1))

    with pytest.raises(DamagedError, match="unreadable spec"):
        open_cache(copied)


@pytest.mark.parametrize("spec", [None, 5, {"template": "v1"}])
def test_a_spec_that_this_version_does_not_know_is_refused(copied: Path, spec: object) -> None:
    for shard in ("ref-000000", "ref-000001"):
        edit_record(copied, shard, lambda values: values["identity"].update(spec=spec))

    with pytest.raises(DamagedError, match=r"identity has no spec|spec has no attention, "):
        open_cache(copied)


@pytest.mark.parametrize("key", ["max_tokens", "logprobs"])
def test_a_record_says_all_of_its_spec(copied: Path, key: str) -> None:
    for shard in ("ref-000000", "ref-000001"):
        edit_record(copied, shard, lambda values: values["identity"]["spec"].pop(key))

    with pytest.raises(DamagedError, match=f"identity: spec has no {key}"):
        open_cache(copied)


def test_a_cache_can_be_opened_again_and_again(cache_path: Path) -> None:
    first, second = open_cache(cache_path), open_cache(str(cache_path))

    assert first.keys() == second.keys()
    assert first.identity == second.identity
