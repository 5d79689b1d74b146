"""Before a run starts, the student's preprocessing must give what the teacher saw."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from shared.cache import Cache, open_cache
from shared.errors import DamagedError, MismatchError, ProjectError
from shared.images import ImageProcessor, pixels_digest
from shared.record import ProbeSample
from shared.tokenizer import Tokenizer, load_tokenizer
from student_train.probe import check_probe
from tests.malicious import MISSHAPEN_PROBES, PROBE_CASES, forge
from tests.student_train.support import STUDENT, recipe, train
from tests.support import CLIP, edit_record, error_line

OTHER = "0" * 64


@pytest.fixture
def forged(full_path: Path, tmp_path: Path) -> Path:
    """A cache whose teacher saw other pixels, with all digests right."""
    import shutil

    shutil.copytree(full_path, tmp_path / "cache")
    edit_record(
        tmp_path / "cache", "mixed-1", lambda values: values["probe"][0].update(pixels_sha256=OTHER)
    )
    return tmp_path / "cache"


def test_a_start_says_what_it_probed(
    tmp_path: Path, tars: list[Path], full_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert train(tmp_path / "run", tars, full_path, "--set", "max_steps=1").exit_code == 0

    assert "probe shards=2 samples=4 unequal=0" in caplog.text


def test_other_pixels_are_refused_and_both_digests_named(
    tmp_path: Path, tars: list[Path], forged: Path
) -> None:
    line = error_line(train(tmp_path / "run", tars, forged))

    key = open_cache(forged).records["mixed-1"].probe[0].key
    assert f"probe.{key}.pixels_sha256: '{OTHER}' there, '" in line
    assert "use the versions of Pillow" in line
    assert not (tmp_path / "run").exists()


def test_a_failed_probe_is_accepted_by_name_and_written_down(
    tmp_path: Path, tars: list[Path], forged: Path
) -> None:
    options = ("--accept-mismatch", "probe", "--set", "max_steps=1")

    assert train(tmp_path / "run", tars, forged, *options).exit_code == 0

    written = json.loads((tmp_path / "run" / "run.json").read_text())["accepted_mismatches"]
    ((name, values),) = written.items()
    assert name.endswith(".pixels_sha256")
    assert values["cache"] == OTHER


@pytest.fixture
def one_off(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """A tokenizer that gives one other id, as another version of its library might."""
    tokenizer = load_tokenizer(STUDENT)
    tokenize = type(tokenizer).__call__

    def changed(self: Tokenizer, text: str) -> Any:
        found = tokenize(self, text)
        found["input_ids"][-1] += 1
        return found

    monkeypatch.setattr(type(tokenizer), "__call__", changed)
    return tokenizer


def test_another_id_is_refused_with_its_place(full_cache: Cache, one_off: Tokenizer) -> None:
    with pytest.raises(MismatchError, match=r"probe\.s000\.ids: '\d+, \d+ at \d+' there, '\d+, "):
        check_probe(
            full_cache, recipe(), one_off, ImageProcessor(CLIP, "pad"), accept=(), accepted={}
        )


def test_what_was_accepted_is_not_asked_again(full_cache: Cache, one_off: Tokenizer) -> None:
    found = check_probe(
        full_cache, recipe(template="plain"), one_off, ImageProcessor(CLIP, "square"), accept=(),
        accepted={"template": 0, "tokenizer.behaviour": 0, "image_aspect": 0},
    )  # fmt: skip

    assert found == {}


@pytest.mark.parametrize("case", PROBE_CASES)
def test_a_forged_probe_is_refused_in_one_line(cache_path: Path, tmp_path: Path, case: str) -> None:
    made = forge(cache_path, tmp_path, case)

    with pytest.raises(ProjectError) as error:
        check_probe(
            open_cache(made.root), recipe(), load_tokenizer(STUDENT), ImageProcessor(CLIP, "pad"),
            accept=(), accepted={},
        )  # fmt: skip

    assert isinstance(error.value, DamagedError) == (case in MISSHAPEN_PROBES)
    assert str(error.value).isprintable()


def test_at_most_eight_shards_are_probed(
    full_cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    first = full_cache.records["mixed-0"]
    many = {f"mixed-{n}": msgspec.structs.replace(first, probe=()) for n in range(50)}
    full_cache = open_cache(full_cache.root)
    full_cache.records = {**many, **{f"t{n}": first for n in range(50)}}

    with caplog.at_level(logging.INFO):
        check_probe(
            full_cache, recipe(), load_tokenizer(STUDENT), ImageProcessor(CLIP, "pad"), accept=(),
            accepted={},
        )  # fmt: skip

    assert "probe shards=8 samples=16" in caplog.text


def test_the_digest_is_that_of_little_endian_float32() -> None:
    pixels = np.arange(12, dtype=np.float32).reshape(3, 2, 2)

    digest = hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest()
    assert pixels_digest(pixels) == digest
    assert pixels_digest(np.asfortranarray(pixels)) == digest
    assert msgspec.convert({"key": "a", "pixels_sha256": digest}, ProbeSample)
