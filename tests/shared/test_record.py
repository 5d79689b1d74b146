"""Records come from strangers: each is checked before anything that it names is touched."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import CacheError, DamagedError, MismatchError
from shared.record import (
    ShardRecord,
    compare,
    differences,
    read_records,
    shard_name,
    sizes_by_array,
)
from tests.support import record


@pytest.fixture
def values(cache_path: Path) -> dict[str, Any]:
    """The values of a real record."""
    found: dict[str, Any] = json.loads((cache_path / "records" / "ref-000000.json").read_text())
    return found


def load(tmp_path: Path, values: object, name: str = "ref-000000") -> ShardRecord:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(values))
    return ShardRecord.load(path)


def test_a_record_survives_its_file(tmp_path: Path, cache_path: Path) -> None:
    found = record(cache_path, "ref-000000")
    (tmp_path / "ref-000000.json").write_text(found.to_json())

    assert ShardRecord.load(tmp_path / "ref-000000.json") == found


FILE = {"size": 1, "sha256": "0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this version reads format 1"),
        ({"name": "../ref-000000"}, "bad shard name"),
        ({"name": ""}, "bad shard name ''"),
        ({"name": ".hidden"}, "bad shard name"),
        ({"data": "/etc"}, "data is '/etc'"),
        ({"data": "data/../../x-01234567"}, "expected data/ref-000000-<8 hex digits>"),
        ({"data": "data/other-01234567"}, "expected data/ref-000000-<8 hex digits>"),
        ({"data": "data/ref-000000-01234567\n"}, "expected data/ref-000000-<8 hex digits>"),
        ({"files": {"/etc/passwd": FILE}}, "path '/etc/passwd' leaves the shard"),
        ({"files": {"a/../../b": FILE}}, "path 'a/../../b' leaves the shard"),
        ({"files": {"..": FILE}}, "leaves the shard"),
        ({"files": {"a\\..\\b": FILE}}, "leaves the shard"),
        ({"files": {"a": {"size": "1 MB", "sha256": "0"}}}, "expected int, found '1 MB'"),
        ({"keys": ["s0"]}, "keys, lengths and images differ in number"),
        ({"keys": ["s0", "s0"]}, "a key stands twice"),
        ({"keys": ["s0", 5]}, "expected str, found 5"),
        ({"identity": {}}, "identity has no spec"),
        ({"boat": 1}, "unknown key 'boat'"),
        ({"tar": {"name": "a"}}, "tar: missing key 'size'"),
    ],
)
def test_a_record_that_cannot_be_is_refused(
    tmp_path: Path, values: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DamagedError, match=r"ref-000000\.json: not a record of format 1") as error:
        load(tmp_path, {**values, **change})

    assert message in str(error.value)


def test_a_record_in_the_place_of_another_is_refused(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    with pytest.raises(DamagedError, match="is the record of shard 'ref-000000'"):
        load(tmp_path, values, name="ref-000001")


def test_a_folder_without_records_holds_none(tmp_path: Path) -> None:
    assert read_records(tmp_path) == {}


def test_sizes_add_up_over_shards_by_array(cache_path: Path) -> None:
    records = list(read_records(cache_path).values())

    sizes = sizes_by_array(records)

    assert sum(sizes.values()) == sum(f.size for r in records for f in r.files.values())
    files = cache_path.glob("data/*/attention_0/**/*")
    assert sizes["attention_0"] == sum(path.stat().st_size for path in files if path.is_file())


@pytest.mark.parametrize("name", ["t.tar", "a-1_b.2.tar", "0.tar", "x", "a" * 200 + ".tar"])
def test_a_tar_gives_its_shard_its_name(name: str) -> None:
    assert shard_name(Path("/some/folder") / name) == name.removesuffix(".tar")


@pytest.mark.parametrize("name", [".tar", "-a.tar", "a b.tar", "é.tar", "a" * 201, ".a.tar", "a\n"])
def test_a_name_that_no_shard_can_have_is_refused(name: str) -> None:
    with pytest.raises(CacheError, match="rename it"):
        shard_name(Path(name))


IDENTITIES = st.recursive(
    st.integers(0, 3), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=6
).filter(lambda value: isinstance(value, dict))


@given(IDENTITIES, IDENTITIES)
def test_two_identities_differ_exactly_if_they_are_unequal(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> None:
    assert bool(list(differences(one, other))) == (one != other)


def test_a_mismatch_names_three_places_and_counts_the_others() -> None:
    one = {"a": {"b": 1, "c": 2}, "d": 3, "e": 4, "same": 0}
    other = {"a": {"b": 5, "c": 6}, "d": 7, "same": 0}

    with pytest.raises(MismatchError) as error:
        compare("x", one, other, "Do this.")

    assert str(error.value) == (
        "x does not fit: a.b: 1 there, 5 here; a.c: 2 there, 6 here; d: 3 there, 7 here "
        "(and 1 more). Do this."
    )


def test_a_record_cannot_be_changed(cache_path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        record(cache_path, "ref-000000").name = "x"  # type: ignore[misc]
