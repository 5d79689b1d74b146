"""Golden caches of format 1: every later version opens them and decodes the very same values."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from cache_builder.cli import cache_tools
from cache_builder.recompute import error_bound
from shared.cache import open_cache
from shared.identity import differences
from shared.reader import ShardReader
from tests.golden import GOLDEN, SHARD, SPECS, TAR, decoded, expected, make_tar
from tests.shared.plain_reader import read_sample
from tests.support import CLIP, TEACHER, build, error_line, invoke, record

each = pytest.mark.parametrize("name", SPECS)


@each
def test_a_golden_cache_decodes_to_exactly_the_stored_values(name: str) -> None:
    found, wanted = decoded(open_cache(GOLDEN / name)), expected(name)

    assert found.keys() == wanted.keys()
    for field, values in wanted.items():
        assert found[field].dtype == values.dtype, field
        np.testing.assert_array_equal(found[field], values, err_msg=field)


@each
def test_a_golden_cache_is_whole(name: str) -> None:
    result = invoke(cache_tools, "verify", str(GOLDEN / name), "--decode")

    assert result.exit_code == 0, result.output


def test_a_cache_of_the_tokenizer_that_lost_spaces_is_refused_by_name() -> None:
    """Before a text that begins with a space it wrote one token less."""
    result = invoke(
        cache_tools, "verify", str(GOLDEN / "exact"), "--teacher", str(TEACHER),
        "--vision-tower", str(CLIP), "--device", "cpu",
    )  # fmt: skip

    assert "tokenizer.behaviour_sha256" in error_line(result)


@each
def test_plain_zarr_gives_the_same_codes(name: str) -> None:
    found = record(GOLDEN / name, SHARD)
    reader = ShardReader(root=GOLDEN / name, record=found)
    group = zarr.open_group(str(GOLDEN / name / found.data), mode="r")

    arrays = sorted(group.array_keys())

    assert arrays == sorted({file.partition("/")[0] for file in found.files} - {"zarr.json"})
    for array in arrays:
        np.testing.assert_array_equal(group[array][...], reader.whole(array), err_msg=array)


@each
def test_the_writer_still_makes_a_golden_cache(name: str, tmp_path: Path) -> None:
    """Arrays alike to the last field of their metadata; values up to the teacher's rounding."""
    build(tmp_path / "cache", TAR, SPECS[name])

    old, new = record(GOLDEN / name, SHARD), record(tmp_path / "cache", SHARD)
    # Format 1 was first written with a tokenizer that lost a leading space.
    assert [path for path, _, _ in differences(new.identity, old.identity)] == [
        "tokenizer.behaviour_sha256"
    ]
    assert (new.tar, new.keys, new.images, new.probe) == (old.tar, old.keys, old.images, old.probe)
    later = {"image_sha256/zarr.json", "image_sha256/c/0/0"}  # format 1 as it was first written
    assert new.files.keys() - later == old.files.keys()
    for file in old.files:
        if file.endswith("zarr.json"):
            ours, theirs = (tmp_path / "cache" / new.data / file, GOLDEN / name / old.data / file)
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text()), file
    found, wanted = decoded(open_cache(tmp_path / "cache")), expected(name)
    assert found.keys() == wanted.keys()
    encodings = open_cache(GOLDEN / name).spec.encodings
    for field, values in wanted.items():
        if values.dtype.kind == "i":
            np.testing.assert_array_equal(found[field], values, err_msg=field)
            continue
        signal = field.partition("/")[2].replace("top_", "").replace("attention_1", "attention")
        noise = 1e-4 * np.abs(values).max(initial=0)
        # Where rounding moves a value over an edge between two codes, it moves by one step.
        step = 2 * error_bound(encodings.get(signal, "float32"), np.abs(values) + noise, values)
        assert (np.abs(found[field] - values) <= step + noise).all(), field


def test_the_golden_tar_is_what_its_maker_makes(tmp_path: Path) -> None:
    assert make_tar(tmp_path / "t.tar").read_bytes() == TAR.read_bytes()


def test_the_format_page_is_enough_to_read_a_sample() -> None:
    wanted = expected("bits6")

    found = read_sample(GOLDEN / "bits6", SHARD, "one", layer=1)

    stored = {name for name in wanted if name.startswith("one/")} - {"one/vision_start"}
    assert {f"one/{name}" for name in found} == stored
    for name, values in found.items():
        np.testing.assert_array_equal(values, wanted[f"one/{name}"], err_msg=name)


def test_golden_caches_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 300_000
