"""Records come from strangers: each is checked before anything that it names is touched."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import CacheError, DamagedError, InputError, MismatchError
from shared.identity import compare, differences
from shared.plan import plan_file, plan_files, read_plan
from shared.record import ShardRecord, Skipped, read_records, shard_name, sizes_by_array
from shared.sealed import MAX_BYTES, seal
from tests.support import record


@pytest.fixture
def values(cache_path: Path) -> dict[str, Any]:
    """The values of a real record."""
    found: dict[str, Any] = json.loads((cache_path / "records" / "ref-000000.json").read_text())
    del found["sha256"]
    return found


def load(tmp_path: Path, content: str | bytes, name: str = "ref-000000") -> ShardRecord:
    path = tmp_path / "records" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return ShardRecord.load(tmp_path, name)


def test_a_record_survives_its_file(tmp_path: Path, cache_path: Path) -> None:
    found = record(cache_path, "ref-000000")

    assert load(tmp_path, found.to_json()) == found


def test_any_flipped_bit_of_a_record_is_found(tmp_path: Path, cache_path: Path) -> None:
    content = (cache_path / "records" / "ref-000000.json").read_bytes()
    path = tmp_path / "records" / "ref-000000.json"
    path.parent.mkdir()
    for position in (*range(100), *range(100, len(content), 7)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)

        with pytest.raises(DamagedError, match="not a record"):
            ShardRecord.load(tmp_path, "ref-000000")


def test_white_space_in_a_record_counts_too(tmp_path: Path, cache_path: Path) -> None:
    text = record(cache_path, "ref-000000").to_json().decode()

    for changed in (text.replace(',"name"', ', "name"'), text + "\n", " " + text):
        with pytest.raises(DamagedError, match="not a record"):
            load(tmp_path, changed)


def test_a_record_of_another_format_is_a_mismatch_and_no_damage(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    with pytest.raises(MismatchError, match="format 2 there, 1 here"):
        load(tmp_path, seal({**values, "format": 2}))


def test_a_record_of_an_older_draft_is_a_mismatch_and_no_damage(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    with pytest.raises(MismatchError, match="older draft of format 1: build the cache again"):
        load(tmp_path, json.dumps(values, separators=(",", ":")))


FILE = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "1"}, "Expected `int`, got `str` - at `$.format`"),
        ({"name": "../ref-000000"}, "bad shard name"),
        ({"name": ""}, "bad shard name ''"),
        ({"name": ".hidden"}, "bad shard name"),
        ({"data": "/etc"}, "data is '/etc'"),
        ({"data": "data/../../x-01234567"}, "expected data/ref-000000-<8 hex>"),
        ({"data": "data/other-01234567"}, "expected data/ref-000000-<8 hex>"),
        ({"data": "data/ref-000000-01234567\n"}, "expected data/ref-000000-<8 hex>"),
        ({"files": {"/etc/passwd": FILE}}, "path '/etc/passwd' leaves the shard"),
        ({"files": {"a/../../b": FILE}}, "path 'a/../../b' leaves the shard"),
        ({"files": {"..": FILE}}, "leaves the shard"),
        ({"files": {"a\\..\\b": FILE}}, "leaves the shard"),
        ({"files": {"a": {"size": "1 MB", "sha256": "0"}}}, "got `str` - at `$.files[...].size`"),
        ({"keys": ["s0"]}, "keys, lengths and images differ in number"),
        ({"keys": ["s0", "s0"]}, "a key stands twice"),
        ({"keys": ["s0", 5]}, "Expected `str`, got `int` - at `$.keys[1]`"),
        ({"identity": {}}, "identity has no spec"),
        ({"identity": {"spec": {}, "more": {}}}, r"identity has ['more'] besides spec, teacher"),
        ({"files": {"": FILE}}, "path '' leaves the shard or has odd characters"),
        ({"files": {"a//b": FILE}}, "leaves the shard"),
        ({"files": {"./a": FILE}}, "leaves the shard"),
        ({"files": {"a/": FILE}}, "leaves the shard"),
        ({"files": {"a\0b": FILE}}, "leaves the shard"),
        ({"files": {"a/" * 8 + "b": FILE}}, "leaves the shard"),
        ({"files": {f"f{n}": FILE for n in range(10_001)}}, "10001 files, at most 10000"),
        ({"files": {"a": {"size": -1, "sha256": "0" * 64}}}, "Expected `int` >= 0"),
        ({"files": {"a": {"size": 2**63, "sha256": "0" * 64}}}, f"Expected `int` <= {2**63 - 1}"),
        ({"files": {"a": {"size": 1, "sha256": "0"}}}, "at `$.files[...].sha256`"),
        ({"files": {"a": {"size": 1, "sha256": "0" * 64 + "\n"}}}, "at `$.files[...].sha256`"),
        (
            {"tar": {**FILE, "name": "/etc/passwd", "index_sha256": "0" * 64}},
            "tar is '/etc/passwd', expected ref-000000.tar",
        ),
        ({"lengths": [1, 0]}, "Expected `int` >= 1 - at `$.lengths[1]`"),
        ({"lengths": [1, 2**31]}, f"Expected `int` <= {2**31 - 1}"),
        ({"lengths": [1, 1.5]}, "Expected `int`, got `float` - at `$.lengths[1]`"),
        ({"lengths": [1, 1.0]}, "Expected `int`, got `float` - at `$.lengths[1]`"),
        ({"lengths": [1, True]}, "Expected `int`, got `bool` - at `$.lengths[1]`"),
        ({"images": [0, -2]}, "Expected `int` >= -1 - at `$.images[1]`"),
        ({"images": [0, 2]}, "image 2, expected -1 to 1"),
        ({"keys": ["a", ""]}, "Expected `str` of length >= 1 - at `$.keys[1]`"),
        ({"keys": ["a", "b\n"]}, "a key cannot be printed"),
        ({"keys": ["a", "\x1b[2J"]}, "a key cannot be printed"),
        ({"keys": ["a", "\ud800"]}, "a key cannot be printed"),
        ({"keys": ["a", "b" * 513]}, "Expected `str` of length <= 512 - at `$.keys[1]`"),
        ({"skipped": [{"key": "a", "reason": "b" * 1025}]}, "key or reason too long"),
        ({"skipped": [{"key": "a"}]}, "missing required field `reason` - at `$.skipped[0]`"),
        ({"bo\x1b[2J" * 100: 1}, r"unknown field `bo\x1b[2J"),
        ({"boat": 1}, "unknown field `boat`"),
        ({"tar": {"name": "a"}}, "missing required field `size` - at `$.tar`"),
    ],
)
def test_a_record_that_cannot_be_is_refused(
    tmp_path: Path, values: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DamagedError, match=r"ref-000000\.json: not a record of format 1") as error:
        load(tmp_path, seal({**values, **change}))

    assert message in str(error.value)


def test_a_record_in_the_place_of_another_is_refused(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    with pytest.raises(DamagedError, match="is the record of shard 'ref-000000'"):
        load(tmp_path, seal(values), name="ref-000001")


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ("teacher", "hidden_size"), ("teacher", "attention_heads"), ("teacher", "vision_tokens"),
        ("teacher", "vocab_size"), ("teacher", "weights_sha256"),
        ("tokenizer", "vocab_size"), ("tokenizer", "vocab_sha256"), ("numerics", "dtype"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrong", [None, [], {}, 1.5])
def test_what_the_tools_look_up_in_an_identity_is_there_and_of_its_type(
    tmp_path: Path, values: dict[str, Any], section: str, field: str, wrong: object
) -> None:
    values["identity"][section][field] = wrong

    with pytest.raises(DamagedError, match=rf"identity: {section}\.{field} is"):
        load(tmp_path, seal(values))


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (nested(7), "over 8 levels"),
        (nested(900), "over 8 levels"),
        (list(range(10_001)), "over 10000 values"),
        ("a" * 10_001, "a text of 10001 characters"),
        ({"a" * 10_001: 1}, "a text of 10001 characters"),
        (2**63, "holds the number"),
        (10**400, "holds the number"),
        (-1e300, "holds the number"),
        (1e400, "Infinity is no JSON"),
    ],
)
def test_an_identity_is_neither_deep_nor_long(
    tmp_path: Path, values: dict[str, Any], more: object, message: str
) -> None:
    values["identity"]["teacher"]["more"] = more

    with pytest.raises(DamagedError, match=message):
        load(tmp_path, seal(values))


def sealed_text(rest: str) -> str:
    """With the right digest in front."""
    return f'{{"sha256":"{hashlib.sha256(rest.encode()).hexdigest()}",{rest}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a":1,"a":1}', "a key stands twice in an object"),
        ("[" * 200_001, "200001 lists and objects, at most 200000"),
        ('{"a":' + "[" * 100_000, "recursion"),
        ('{"format":1e999}', "Expected `int`, got `float`"),
        ('{"format":' + "9" * 5000 + "}", "4300 digits"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_would_hurt_is_refused_before_it_is_used(
    tmp_path: Path, content: str, message: str
) -> None:
    with pytest.raises(DamagedError, match=message):
        load(tmp_path, sealed_text(content[1:]))


def test_a_key_that_stands_twice_is_refused_wherever_it_stands(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    rest = seal(values)[77:].decode()
    pairs = [*re.finditer(r'(?<=[{,])"[^"]*":', "," + rest)]
    assert len(pairs) > 100
    for pair in pairs:
        begin, end = pair.start() - 1, pair.end() - 1
        _, behind = json.JSONDecoder().raw_decode(rest, end)

        with pytest.raises(DamagedError, match="a key stands twice in an object"):
            load(tmp_path, sealed_text(f"{rest[:behind]},{rest[begin:]}"))


@pytest.mark.parametrize(
    "style",
    [
        {"indent": 1}, {"separators": (",", ":")}, {"separators": (" , ", "\t:\n")},
        {"sort_keys": True}, {"ensure_ascii": False},
    ],
)  # fmt: skip
def test_a_record_is_the_same_however_its_json_is_written(
    tmp_path: Path, values: dict[str, Any], style: dict[str, Any]
) -> None:
    values["keys"] = ['\u5b57/\\"\U0001f600', "b"]
    values["probe"] = []
    values["identity"]["image_processor"] |= {"small": 1e-7, "large": 1.5e17, "long": 2**62}
    found = load(tmp_path, sealed_text(json.dumps(values, **style)[1:]))

    assert json.loads(msgspec.json.encode(found)) == values
    assert load(tmp_path, found.to_json()) == found


def test_what_a_tar_may_call_its_members_is_written_and_read(
    tmp_path: Path, cache_path: Path
) -> None:
    skipped = tuple(Skipped(key=key, reason="\x1b\x7f\n") for key in ("\udc80", "\u5b57", "", "a"))
    found = msgspec.structs.replace(record(cache_path, "ref-000000"), skipped=skipped)

    assert load(tmp_path, found.to_json()) == found


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "latin-1"])
def test_a_record_is_utf_8(tmp_path: Path, values: dict[str, Any], encoding: str) -> None:
    values["skipped"] = [{"key": "\xe9", "reason": "\xe9"}]
    rest = seal(values)[77:].decode().encode(encoding)
    for content in (rest, b"\0" + rest):
        head = b'{"sha256":"%s",' % hashlib.sha256(content).hexdigest().encode()
        with pytest.raises(DamagedError, match="not a record"):
            load(tmp_path, head + content)


def test_a_large_record_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "records" / "a.json"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)

    with pytest.raises(DamagedError, match=f"is {MAX_BYTES + 1} bytes, expected at most"):
        ShardRecord.load(tmp_path, "a")


def test_a_record_that_is_too_large_for_a_reader_is_not_written(cache_path: Path) -> None:
    found = record(cache_path, "ref-000000")
    many = tuple(Skipped(key=f"{n:0100d}", reason="é" * 100) for n in range(60_000))

    with pytest.raises(CacheError, match="put fewer samples into a tar"):
        msgspec.structs.replace(found, skipped=many).to_json()


@pytest.mark.parametrize(
    "wrong", [{"lengths": (1, 0)}, {"images": (0, -2)}, {"keys": ("a", "b" * 513)}]
)
def test_a_record_that_no_reader_would_take_is_not_written(
    cache_path: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(DamagedError, match="Expected"):
        msgspec.structs.replace(record(cache_path, "ref-000000"), **wrong).to_json()


@pytest.mark.parametrize("name", [".hidden.json", "a.json.0123abcd.partial", "notes.txt", "-.json"])
def test_what_lies_beside_the_records_does_not_matter(
    cache_path: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(cache_path, tmp_path / "cache")
    (tmp_path / "cache" / "records" / name).write_text("{half")

    assert list(read_records(tmp_path / "cache")) == ["ref-000000", "ref-000001"]


def test_a_plan_is_named_by_its_digest_and_every_flip_is_found(tmp_path: Path) -> None:
    file, content = plan_file(["b", "a"])
    (tmp_path / "plans").mkdir()
    path = tmp_path / file
    path.write_bytes(content)
    assert plan_files(tmp_path) == [file]
    assert read_plan(tmp_path, file) == ("a", "b")

    for position in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedError, match=r"not a plan .* it may be deleted"):
            read_plan(tmp_path, file)


@pytest.mark.parametrize("name", ["a/../../x", "a\n", "../a", ""])
def test_a_plan_with_a_name_that_no_shard_can_have_is_refused(tmp_path: Path, name: str) -> None:
    file, content = plan_file([name])
    (tmp_path / "plans").mkdir()
    (tmp_path / file).write_bytes(content)

    with pytest.raises(DamagedError, match=r"not a plan \(a name in it is no shard's"):
        read_plan(tmp_path, file)


def test_a_plan_of_many_lists_is_refused_before_they_are_made(tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    file = "plans/0123456789abcdef.json"
    (tmp_path / file).write_text('{"shards":[' + "[]," * 200_000 + "[]]}")

    with pytest.raises(DamagedError, match="200003 lists and objects, at most 200000"):
        read_plan(tmp_path, file)


@pytest.mark.parametrize("name", ["0123456789abcdef.json.old", "0123456789abcdef.json\n"])
def test_what_lies_beside_the_plans_is_passed_over(tmp_path: Path, name: str) -> None:
    file, _ = plan_file(["a"])
    (tmp_path / "plans").mkdir()
    for path in (file, f"plans/{name}"):
        (tmp_path / path).touch()

    assert plan_files(tmp_path) == [file]


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
    with pytest.raises(InputError, match="rename it"):
        shard_name(Path(name))


def sections(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from("abc"), inner, max_size=3)


NUMBERS = st.integers(0, 3)
IDENTITIES = sections(NUMBERS | sections(NUMBERS | sections(NUMBERS)))


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


def test_what_differs_and_is_accepted_is_given_with_both_sides() -> None:
    one = {"a": {"b": 1, "c": {"d": 2}}, "ab": 3}
    other = {"a": {"b": 5, "c": {"d": 6}}, "ab": 3}

    assert compare("x", one, other, "", accept=("a",)) == {"a.b": (1, 5), "a.c.d": (2, 6)}
    with pytest.raises(MismatchError, match=r"fit: ab: 3 there, 4 here\. "):
        compare("x", one, other | {"ab": 4}, "", accept=("a",))
