"""A stranger's cache is data only: every kind of forgery is one of our errors, in one line."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from benchmarks.bit_flips import flip_bits
from benchmarks.fuzz import run_child
from cache_builder.cli import cache_tools
from shared import bounds, sealed
from shared.cache import open_cache
from shared.errors import ProjectError
from shared.record import ShardRecord
from shared.spec import CacheSpec
from tests.malicious import CASES, QUIET_CASES, Forge, forge, outside_of
from tests.support import REFERENCE, invoke


def read_all(root: Path) -> None:
    cache = open_cache(root)
    for key in cache.keys():  # noqa: SIM118  (a Cache is not a dict)
        cache.read(key)


def run_all_tools(forged: Forge) -> None:
    """Each ends well, or in one line that cannot steer a terminal."""
    for arguments in (["info"], ["verify", "--decode"], ["gc"], ["repair"]):
        result = invoke(cache_tools, *arguments, str(forged.root))

        assert result.exit_code in (0, 1)
        assert all(line.isprintable() for line in result.stdout.splitlines())
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
        assert len(errors) == result.exit_code


@pytest.mark.parametrize("case", CASES)
def test_reading_refuses_and_the_tools_stay_civil(
    cache_path: Path, tmp_path: Path, case: str
) -> None:
    forged = forge(cache_path, tmp_path, case)
    before = outside_of(forged)

    with pytest.raises(ProjectError) as error:
        read_all(forged.root)

    assert str(error.value).isprintable()
    run_all_tools(forged)
    assert outside_of(forged) == before


@pytest.mark.parametrize("case", QUIET_CASES)
def test_what_no_reader_looks_at_does_not_stop_reading(
    cache_path: Path, tmp_path: Path, case: str
) -> None:
    forged = forge(cache_path, tmp_path, case)
    before = outside_of(forged)

    read_all(forged.root)

    run_all_tools(forged)
    assert outside_of(forged) == before


# Short forms of the long proofs in docs/trust


def test_flipped_bits_are_found_by_verify_and_never_read_as_other_values(
    cache_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(cache_path, tmp_path / "cache")

    counts = flip_bits(tmp_path / "cache", flips=40, seed=7)

    assert sum(n for (_, what), n in counts.items() if what == "found by verify") == 40
    assert sum(n for (_, what), n in counts.items() if what == "read: WRONG") == 0


def test_a_few_seconds_of_fuzzing_find_nothing(
    cache_path: Path, packed_tars: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(cache_path, tmp_path / "cache")
    shutil.copy(packed_tars[0], tmp_path)

    assert run_child(tmp_path, minutes=0.04, seed=3).returncode == 0


# The schemas of cache_specs/ say what the code says


def schema(name: str) -> dict[str, Any]:
    path = REFERENCE.parents[1] / "cache_specs" / f"{name}.schema.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_schema_of_records_has_the_fields_and_the_bounds_of_the_code() -> None:
    found = schema("record")
    properties = found["properties"]

    names = {"sha256", *ShardRecord.__struct_fields__}
    assert set(properties) == set(found["required"]) == names
    assert properties["keys"]["maxItems"] == bounds.MAX_SAMPLES
    assert properties["keys"]["items"]["maxLength"] == bounds.MAX_TEXT
    assert properties["probe"]["maxItems"] == bounds.MAX_PROBE
    spec = properties["identity"]["properties"]["spec"]["properties"]
    assert set(spec) == {field.name for field in fields(CacheSpec)}
    assert spec["max_tokens"]["maximum"] == bounds.MAX_TOKENS
    forms = found["$defs"]
    assert forms["logprobs"]["properties"]["top_k"]["maximum"] == bounds.MAX_TOP_K
    layers = forms["attention"]["properties"]["layers"]
    assert layers["items"]["maximum"] == bounds.MAX_LAYERS - 1
    assert str(sealed.MAX_BYTES) in found["description"]
    identity = properties["identity"]
    assert set(identity["required"]) == set(identity["properties"]) == set(bounds.IDENTITY)
    assert identity["additionalProperties"] is False


def test_a_real_record_and_plan_have_the_form_of_their_schemas(cache_path: Path) -> None:
    for folder in ("records", "plans"):
        found = schema(folder.removesuffix("s"))
        for path in (cache_path / folder).iterdir():
            jsonschema.validate(json.loads(path.read_text()), found)
