"""`cache-tools fidelity`: what encodings lose, of the arrays and of a student's gradients."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cache_builder.cli import cache_tools
from cache_builder.fidelity import choose_samples
from shared.cache import open_cache
from tests.support import (
    CLIP,
    FULL,
    REFERENCE,
    TEACHER,
    build,
    error_line,
    invoke,
    sample,
    teacher_copy,
    text_sample,
    write_tar,
)

DEFAULT = {
    **FULL,
    "attention": {"layers": [0], "encoding": "sqrt6"},
    "vision_tokens": {"encoding": "channel6"},
    "logprobs": {"top_k": 64, "encoding": "logprob8"},
}
STUDENT = (
    *("--student", REFERENCE / "student", "--student-vision-tower", CLIP),
    *("--set", "global_batch=4", "--set", "micro_batch=2"),
)


def measure(cache: Path, tars: list[Path], *options: object, teacher: Path = TEACHER) -> Any:
    data = [text for tar in tars for text in ("--data", tar)]
    given = (cache, *data, "--teacher", teacher, "--vision-tower", CLIP, "--device", "cpu")
    return invoke(cache_tools, "fidelity", *map(str, (*given, *options)))


def report(cache: Path, tars: list[Path], *options: object) -> Any:
    result = measure(cache, tars, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_float32_cache_is_exact(cache_path: Path, packed_tars: list[Path]) -> None:
    found = report(cache_path, packed_tars)

    assert [array["array"] for array in found["arrays"]] == [
        "attention_0", "vision_tokens", "top_logprobs"
    ]  # fmt: skip
    assert all(array["relative_l2"] == array["largest"] == 0 for array in found["arrays"])
    assert (found["samples"], found["other_ids"], found["students"]) == (4, 0, [])


def test_the_default_spec_stays_within_its_documented_bounds(
    tmp_path: Path, packed_tars: list[Path]
) -> None:
    build(tmp_path / "cache", packed_tars, DEFAULT)

    found = report(tmp_path / "cache", packed_tars, *STUDENT)

    errors = {array["array"]: array["largest"] for array in found["arrays"]}
    step = (1 + 2**-7) / 63  # of 6 bits; see cache_specs/encodings
    assert 0 < errors["attention_0"] <= 2 * step + step**2
    assert 0 < errors["vision_tokens"] <= 2 * step  # of a range of twice the largest value
    eighth = (1 + 2**-7) / 255
    assert 0 < errors["top_logprobs"] <= eighth + eighth**2 / 4
    assert errors["rest_logprobs"] == 0
    (student,) = found["students"]
    assert (student["steps"], student["batch"]) == (1, 4)
    assert set(student["groups"]) == {"language model", "projector", "adapters"}
    terms = student["terms"]
    assert terms["sup"]["worst_error"] == 0
    assert 0.99 < terms["loss"]["worst_cosine"] < 1


def test_a_cache_of_another_teacher_is_refused(
    tmp_path: Path, cache_path: Path, packed_tars: list[Path]
) -> None:
    other = teacher_copy(
        tmp_path / "other", edit=lambda tensors: tensors["lm_head.weight"].add_(0.01)
    )

    line = error_line(measure(cache_path, packed_tars, teacher=other))

    assert "teacher.weights_sha256" in line
    assert "Give the teacher and the tars that the cache was built with" in line


def test_a_tar_that_was_packed_anew_is_refused(
    tmp_path: Path, cache_path: Path, packed_tars: list[Path]
) -> None:
    keys = open_cache(cache_path).keys()
    other = write_tar(tmp_path / packed_tars[0].name, *map(sample, keys[:2]))

    line = error_line(measure(cache_path, [other]))

    assert f"shard {other.stem}: tar does not fit: index_sha256" in line


def test_tars_of_another_data_set_are_refused(tmp_path: Path, cache_path: Path) -> None:
    other = write_tar(tmp_path / "other.tar", sample("other"))

    assert "none of its 4 samples is in the 1 tars" in error_line(measure(cache_path, [other]))


def test_a_failure_of_the_students_process_ends_the_command(
    cache_path: Path, packed_tars: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "false")

    result = measure(cache_path, packed_tars, *STUDENT)

    assert (result.exit_code, result.stdout) == (1, "")


def test_samples_are_spread_over_all_tars(tmp_path: Path) -> None:
    tars = [
        write_tar(tmp_path / f"t-{n}.tar", *[text_sample(f"s{n}-{i}") for i in range(9)])
        for n in range(3)
    ]
    build(tmp_path / "cache", tars)

    chosen = choose_samples(open_cache(tmp_path / "cache"), tars, 5)

    taken = {index.name: [s.key for s in index.samples] for index in chosen}
    assert taken == {"t-0": ["s0-0", "s0-6"], "t-1": ["s1-4"], "t-2": ["s2-2", "s2-8"]}
