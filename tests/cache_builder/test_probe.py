"""The probe: what a shard stores of its inputs, and that a teacher gives its targets again."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cache_builder.cli import cache_tools
from cache_builder.recompute import NOISE
from shared.bounds import MAX_PROBE_IMAGE
from shared.errors import DamagedError, MismatchError
from shared.images import ImageProcessor, decode_image, pixels_digest
from shared.probe import read_probe
from tests.malicious import DECODE_CASES, MISSHAPEN_PROBES, SHARD, Forge
from tests.support import (
    CLIP,
    FULL,
    TEACHER,
    annotation,
    build,
    error_line,
    invoke,
    png,
    record,
    sample,
    teacher_copy,
    text_sample,
    write_tar,
)

COARSE = {
    **FULL,
    "attention": {"layers": [0, 1], "encoding": "sqrt4"},
    "vision_tokens": {"encoding": "channel4"},
    "logprobs": {"top_k": 8, "encoding": "logprob8"},
}
LARGE = png(1) + bytes(MAX_PROBE_IMAGE)


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples that cannot be used or are too large, then good ones of both kinds."""
    return write_tar(
        tmp_path_factory.mktemp("tar") / f"{SHARD}.tar",
        sample("broken", image=b"x"),
        sample("large", image=LARGE),
        sample("a", annotation("<image>\nwhat", "red"), png(2)),
        sample("b", image=png(3)),
        text_sample("text"),
        text_sample("more"),
    )


@pytest.fixture(scope="module")
def coarse(tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coarse") / "cache"
    build(out, tar, COARSE)
    return out


def verify(root: Path, teacher: Path = TEACHER, *options: str) -> Any:
    return invoke(
        cache_tools, "verify", str(root), "--teacher", str(teacher), "--vision-tower", str(CLIP),
        "--device", "cpu", *options,
    )  # fmt: skip


def test_the_first_small_sample_of_each_kind_is_stored_as_it_lay_in_the_tar(coarse: Path) -> None:
    image, text = read_probe(coarse, record(coarse, SHARD))

    assert (image.key, image.image) == ("a", png(2))
    assert json.loads(image.annotation) == annotation("<image>\nwhat", "red")
    processor = ImageProcessor(CLIP, "pad")
    assert image.pixels_sha256 == pixels_digest(processor(decode_image(png(2))))
    assert (text.key, text.image, text.pixels_sha256) == ("text", None, None)


def test_a_shard_without_usable_samples_has_no_probe(tmp_path: Path) -> None:
    build(tmp_path / "cache", write_tar(tmp_path / "t.tar", sample("broken", image=b"x")), FULL)

    assert read_probe(tmp_path / "cache", record(tmp_path / "cache", "t")) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_gives_its_targets_again(tar: Path, tmp_path: Path, dtype: str) -> None:
    build(tmp_path / "cache", tar, COARSE, dtype=dtype)

    result = verify(tmp_path / "cache")

    assert result.exit_code == 0, result.output
    assert "2 of the probe computed again: all good" in result.stdout


def test_exact_targets_are_given_again_too(cache_path: Path) -> None:
    assert verify(cache_path).exit_code == 0


def test_another_teacher_is_refused_by_name(coarse: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] *= 2

    line = error_line(verify(coarse, teacher_copy(tmp_path / "teacher", edit=edit)))

    assert "teacher.weights_sha256" in line


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ("attention_1", "attention weights of layer 1 are"),
        ("vision_tokens", "vision tokens are"),
        ("top_logprobs", "log-probabilities are"),
        ("top_ids", "likeliest tokens are"),
        ("rest_logprobs", "rests of the log-probabilities are"),
        ("input_ids", "ids: "),
        ("labels", "labels: "),
        ("query_offsets", "query rows, expected"),
    ],
)
def test_values_that_the_teacher_does_not_give_are_found_though_every_digest_is_right(
    coarse: Path, tmp_path: Path, array: str, message: str
) -> None:
    import zarr

    made = forged(coarse, tmp_path)
    values = zarr.open_group(str(made.data), mode="r")[array][...]
    if array.startswith(("attention", "vision")):
        row = 0 if array == "attention_1" else 1
        values[row:] = np.roll(values[row:], 5, axis=-1)
    elif array == "top_ids":
        values = (values + 1) % 512
    elif array == "top_logprobs":
        values = values // 2
    elif array in ("input_ids", "labels"):
        behind = record(made.root, SHARD).keys.index("a") + 1
        values[zarr.open_group(str(made.data), mode="r")["token_offsets"][behind] - 1] += 1
    elif array == "query_offsets":
        values[1] -= 1
    else:
        values[5:] += 1
    made.write_array(array, values)

    result = verify(made.root, TEACHER, "--json")

    problems = json.loads(result.stdout)["problems"]
    assert any(p["kind"] == "targets" and message in p["what"] for p in problems), problems
    assert f"1 shards hold other values than this teacher gives: {SHARD};" in error_line(result)


def forged(cache: Path, folder: Path) -> Forge:
    shutil.copytree(cache, folder / "cache")
    return Forge(root=folder / "cache", outside=folder)


@pytest.mark.parametrize("case", MISSHAPEN_PROBES)
def test_a_forged_probe_is_damage_in_one_line(coarse: Path, tmp_path: Path, case: str) -> None:
    made = forged(coarse, tmp_path)
    MISSHAPEN_PROBES[case](made)

    with pytest.raises(DamagedError, match=SHARD):
        read_probe(made.root, record(made.root, SHARD))
    assert f"1 of 1 shards are damaged: {SHARD}" in error_line(
        invoke(cache_tools, "verify", "--decode", str(made.root))
    )


@pytest.mark.parametrize(
    ("digests", "message"),
    [
        (np.zeros((3, 32), np.uint8), f"sample 'a': image_sha256: {'0' * 64} stored, the probe's"),
        (np.zeros((4, 32), np.uint8), "4 digests of images, the record says 3 images"),
        (np.zeros((3, 16), np.uint8), "image_sha256 is uint8 [3, 16], expected uint8 [rows, 32]"),
        (np.zeros((3, 32), np.int32), "image_sha256 is int32 [3, 32], expected uint8"),
        (np.zeros((2, 32), np.uint8), "image_sha256 has 2 rows, not rows 2 to 3"),
    ],
)
def test_forged_image_digests_are_found(
    coarse: Path, tmp_path: Path, digests: Any, message: str
) -> None:
    made = forged(coarse, tmp_path)
    made.write_array("image_sha256", digests)

    result = invoke(cache_tools, "verify", "--decode", str(made.root))

    assert message in result.stdout
    assert f"1 of 1 shards are damaged: {SHARD}" in error_line(result)


def test_another_image_in_the_probe_is_found_by_decode_and_with_the_teacher(
    coarse: Path, tmp_path: Path
) -> None:
    made = forged(coarse, tmp_path)
    DECODE_CASES["probe: another image, its pixels_sha256 put right"](made)

    for result in (verify(made.root), invoke(cache_tools, "verify", "--decode", str(made.root))):
        assert result.exit_code == 1
        assert "sample 'a': image_sha256: " in result.stdout


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ([{"key": "x", "pixels_sha256": None}], "probe 'x' is no sample of the shard"),
        ([{"key": "a", "pixels_sha256": None}], "probe 'a': pixels_sha256 is None, image 1"),
        ([{"key": "text", "pixels_sha256": "0" * 64}], "image -1"),
        ([{"key": "text", "pixels_sha256": "x"}], "pixels_sha256`"),
        ([{"key": "text", "pixels_sha256": None}] * 2, "probe has a key twice"),
    ],
)
def test_a_record_names_only_probes_that_can_be(
    coarse: Path, tmp_path: Path, probe: object, message: str
) -> None:
    made = forged(coarse, tmp_path)
    made.edit(lambda values: values.update(probe=probe))

    with pytest.raises(DamagedError) as error:
        record(made.root, SHARD)

    assert message in str(error.value)


def test_a_record_of_a_draft_without_probe_is_a_mismatch_and_no_damage(
    coarse: Path, tmp_path: Path
) -> None:
    made = forged(coarse, tmp_path)
    made.edit(lambda values: values.pop("probe"))

    with pytest.raises(MismatchError, match="without `probe` there, one with it here"):
        record(made.root, SHARD)


_WHATS = {
    "attention_0": "attention weights of layer 0 are",
    "vision_tokens": "vision tokens are",
    "top_logprobs": "log-probabilities are",
    "rest_logprobs": "rests of the log-probabilities are",
}
"Array -> what verify says of it."


@pytest.fixture(scope="module")
def exact(tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exact") / "cache"
    build(out, tar, {**FULL, "logprobs": {"top_k": 8, "encoding": "float32"}})
    return out


@pytest.mark.parametrize(("times", "is_found"), [(0.5, False), (4.0, True), (float("nan"), True)])
@pytest.mark.parametrize("array", _WHATS)
def test_values_further_off_than_arithmetic_makes_them_are_found(
    exact: Path, tmp_path: Path, array: str, times: float, is_found: bool
) -> None:
    made = forged(exact, tmp_path)
    values = zarr.open_group(str(made.data), mode="r")[array][...]
    made.write_array(array, (values * (1 + times * NOISE["float32"])).astype(values.dtype))

    result = verify(made.root)

    assert (f": {_WHATS[array]}" in result.stdout) == is_found, result.stdout
    assert SHARD in result.output or not is_found
