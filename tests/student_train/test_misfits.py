"""What does not fit is refused in one line that names both sides."""

import json
import shutil
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from shared.cache import Cache
from shared.checkpoint import ModelFolder
from shared.errors import CheckpointError, MismatchError
from shared.images import ImageProcessor
from shared.mobilevlm import read_config
from student_train.setup import Inputs, check_fit
from tests.student_train.support import SPEC, STUDENT, aligned, recipe, train
from tests.support import CLIP, build, denied, error_line, text_sample, write_tar

Refused = Callable[..., str]


@pytest.fixture
def refused(tars: list[Path], full_path: Path, tmp_path: Path) -> Refused:
    """The error line of a run that is refused before it begins."""

    def run(*options: object, cache: Path | None = full_path, **changes: Any) -> str:
        out = tmp_path / "run"
        line = error_line(train(out, tars, cache, *options, **changes))
        assert not (out / "checkpoints").exists()
        return line

    return run


def student_copy(folder: Path, **config: Any) -> Path:
    shutil.copytree(STUDENT, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def student_of(folder: Path, vocabulary: int) -> Path:
    """The reference student with more rows of vocabulary, as padded checkpoints have, or fewer."""
    student_copy(folder, vocab_size=vocabulary)
    tensors = torch.load(STUDENT / "pytorch_model.bin", weights_only=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.zeros(vocabulary, 32)
        rows[: len(tensors[name])] = tensors[name][:vocabulary]
        tensors[name] = rows
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def test_a_tokenizer_with_more_ids_than_the_student_knows(refused: Refused, tmp_path: Path) -> None:
    line = refused("--student", student_of(tmp_path / "student", 300), cache=None)

    assert "the tokenizer gives id 511" in line
    assert "vocab_size is 300" in line


def test_another_vocabulary_size_under_the_kl(refused: Refused, tmp_path: Path) -> None:
    line = refused("--student", student_of(tmp_path / "student", 528))

    assert "vocab_size: 512 there, 528 here" in line


def test_a_teachers_larger_vocabulary_cannot_be_accepted_under_the_kl(
    tars: list[Path], tmp_path: Path
) -> None:
    teacher = Path(student_of(tmp_path / "teacher", 528))
    build(tmp_path / "cache", tars, SPEC, teacher=teacher)

    result = train(tmp_path / "run", tars, tmp_path / "cache", "--accept-mismatch", "vocab_size")

    assert "has 528 tokens, the student's 512" in error_line(result)


def test_another_vocabulary_size_is_fine_without_the_kl(
    tars: list[Path], full_path: Path, tmp_path: Path
) -> None:
    student = student_of(tmp_path / "student", 528)

    result = train(
        tmp_path / "run", tars, full_path, "--student", student, loss={"kl": 0}, max_steps=1
    )

    assert result.exit_code == 0, result.output


def test_another_number_of_vision_tokens(full_cache: Cache) -> None:
    """No teacher of this project has one, but a cache from elsewhere could say so."""
    student = aligned(recipe(), full_cache)
    other = copy(full_cache)
    teacher = {**other.identity["teacher"], "vision_tokens": 576}
    other.identity = {**other.identity, "teacher": teacher}
    from shared.tokenizer import load_tokenizer

    inputs = Inputs(
        data=[], eval_data=[], student="student", vision_tower=None, cache=None, adapters=None
    )
    processor = ImageProcessor(CLIP, "pad")
    with pytest.raises(MismatchError, match="vision_tokens: 576 there, 144 here"):
        check_fit(other, recipe(), load_tokenizer(STUDENT), processor, student.model, inputs)


@pytest.mark.parametrize(
    ("options", "changes", "says"),
    [((), {"global_batch": 128, "micro_batch": 2}, "fewer than one global batch of 128"),
     (("--eval-data", "nowhere-*.tar"), {}, "nowhere-*.tar")],
    ids=["too few samples", "no held-out tars"],
)  # fmt: skip
def test_a_run_that_was_refused_can_be_begun_in_the_same_folder(
    options: tuple[str, ...], changes: dict[str, Any], says: str, tars: list[Path], tmp_path: Path
) -> None:
    assert says in error_line(train(tmp_path / "run", tars, None, *options, **changes))

    result = train(tmp_path / "run", tars, None, max_steps=1)

    assert result.exit_code == 0, result.output


def test_a_vision_tower_that_is_not_there_is_said_to_be_the_configs(tmp_path: Path) -> None:
    folder = student_copy(tmp_path / "student", mm_vision_tower="openai/no/tower")

    with pytest.raises(
        CheckpointError, match=r"config\.json of .*student names: openai/no/tower: "
    ):
        read_config(ModelFolder(str(folder)))


def test_a_llama_of_transformers_5_becomes_a_mobilevlm_that_the_original_code_reads(
    tmp_path: Path,
) -> None:
    """It reads no `rope_parameters`, and would run with the base 10000."""
    folder = tmp_path / "llama"
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    llama = LlamaConfig(rope_parameters=rope)
    llama.save_pretrained(folder)

    config = read_config(ModelFolder(str(folder)), str(CLIP))

    assert config.published["rope_theta"] == 5e5
    assert not {"rope_parameters", "dtype"} & config.published.keys()
    assert config.llama.rope_parameters == {**rope, "type": "linear"}
    assert config.published["rope_scaling"] == {"type": "linear", "factor": 2.0}


def test_a_student_layer_that_is_not_there(refused: Refused) -> None:
    line = refused(loss={"layer_map": {0: 2}})

    assert "teacher layer 0 is to teach student layer 2" in line
    assert "the student has layers 0 to 1" in line


def test_a_teacher_layer_that_is_not_in_the_cache(refused: Refused) -> None:
    line = refused(loss={"layer_map": {5: 0}})

    assert "teacher layer 5" in line
    assert "the cache stores layers [0, 1]" in line


@pytest.mark.parametrize(
    ("signal", "weight"),
    [("logprobs", "kl"), ("attention", "attention"), ("vision_tokens", "vision")],
)
def test_a_weight_for_a_signal_that_the_cache_does_not_store(
    signal: str, weight: str, refused: Refused, tars: list[Path], tmp_path: Path
) -> None:
    spec = {name: value for name, value in SPEC.items() if name != signal}
    build(tmp_path / "cache", tars, spec)
    loss = {"layer_map": None, weight: 2.5}

    line = refused(cache=tmp_path / "cache", loss=loss)

    assert f"weighs loss.{weight} with 2.5" in line
    assert f"--set loss.{weight}=0" in line


def test_focus_without_attention(refused: Refused, tars: list[Path], tmp_path: Path) -> None:
    spec = {name: value for name, value in SPEC.items() if name != "attention"}
    build(tmp_path / "cache", tars, spec)

    line = refused(cache=tmp_path / "cache", loss={"attention": 0})

    assert "loss.focus_tokens needs attention" in line


def test_a_cache_of_other_tars(refused: Refused, tmp_path: Path) -> None:
    other = write_tar(tmp_path / "other.tar", text_sample("x1"), text_sample("x2"))
    build(tmp_path / "cache", other, SPEC)

    line = refused(cache=tmp_path / "cache")

    assert "none of the cache's 2 samples is in --data" in line
    assert "'x1'" in line


def test_a_tar_of_the_right_name_and_another_size(
    tars: list[Path], full_path: Path, tmp_path: Path
) -> None:
    other = write_tar(tmp_path / tars[0].name, text_sample("s000"))

    line = error_line(train(tmp_path / "run", [other], full_path))

    sizes = f"{tars[0].stat().st_size} there, {other.stat().st_size} here"
    assert f"tar.{tars[0].name}.size: {sizes}" in line


def test_samples_that_the_cache_does_not_have_are_left_out_with_a_warning(
    tars: list[Path], full_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = write_tar(tmp_path / "more.tar", text_sample("x1"))

    result = train(tmp_path / "run", [*tars, more], full_path, max_steps=1)

    assert result.exit_code == 0, result.output
    assert "1 of the 25 samples in --data are not in the cache" in caplog.text


@pytest.mark.parametrize("cached", [True, False])
def test_samples_over_the_limit_are_skipped_and_listed(
    cached: bool, tars: list[Path], full_path: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    cache = full_path if cached else None

    result = train(tmp_path / "run", tars, cache, max_tokens=188, max_steps=1, global_batch=4,
                   micro_batch=4)  # fmt: skip

    assert result.exit_code == 0, result.output
    assert "tokens, at most 188" in caplog.text


def test_all_skipped_samples_are_listed_in_the_runs_folder(
    tars: list[Path], full_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [text_sample(f"long{n}", "word " * 200) for n in range(25)]
    more = write_tar(tmp_path / "more.tar", *long)

    result = train(tmp_path / "run", [*tars, more], None, max_tokens=220, max_steps=1)

    assert result.exit_code == 0, result.output
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [f"long{n}" for n in range(25)]
    assert all("tokens, at most 220" in json.loads(line)["reason"] for line in lines)
    assert "skipped 5 more: all are in --out's skipped.jsonl" in caplog.text


def test_no_sample_within_the_limit(refused: Refused) -> None:
    line = refused(max_tokens=10)

    assert "no sample in 2 tars can be used" in line
    assert "tokens, at most 10" in line


def test_adapters_of_another_shape(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "adapters.safetensors"
    save_file({"vision.weight": torch.zeros(8, 16), "vision.bias": torch.zeros(8)}, file)

    line = refused("--adapters", file)

    assert "'vision.weight': [8, 16]" in line
    assert "'vision.weight': [32, 64]" in line


def test_adapters_that_are_no_safetensors(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "adapters.safetensors"
    file.write_bytes(b"nothing of the kind")

    assert f"{file}: cannot be read" in refused("--adapters", file)
    assert "cannot be read" in refused("--adapters", tmp_path / "absent")


def test_adapters_without_a_cache(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "adapters.safetensors"
    save_file({"vision.bias": torch.zeros(1)}, file)

    assert "--adapters needs --cache" in refused("--adapters", file, cache=None)


def test_a_student_folder_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    assert "no such folder" in refused("--student", tmp_path / "absent")


def test_a_cache_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    assert "no cache here" in refused(cache=tmp_path)


def test_a_tar_that_is_not_there(full_path: Path, tmp_path: Path) -> None:
    line = error_line(train(tmp_path / "run", [tmp_path / "absent.tar"], full_path))

    assert "no such tar" in line


@pytest.mark.parametrize("option", ["--data", "--student", "--vision-tower", "--recipe", "--out"])
def test_what_lies_in_a_folder_that_may_not_be_searched_is_one_line(
    refused: Refused, tmp_path: Path, option: str
) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()

    with denied(folder):
        assert f"{folder}/x" in (line := refused(option, folder / "x", cache=None))

    assert line.endswith("cannot be read (Permission denied)")


def test_a_global_batch_larger_than_the_data(refused: Refused) -> None:
    line = refused(global_batch=32)

    assert "24 samples are fewer than one global batch of 32" in line


def test_float16_on_a_cpu(refused: Refused) -> None:
    assert "precision float16 needs a GPU" in refused(precision="float16")


# -- an --out that is taken ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tars: list[Path], full_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(out, tars, full_path, max_steps=1).exit_code == 0
    return out


def test_an_out_that_holds_a_run(finished: Path, tars: list[Path], full_path: Path) -> None:
    line = error_line(train(finished, tars, full_path, max_steps=1))

    assert f"{finished}: holds a run already; --resume continues it" in line


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 3}, "recipe.seed was 0 and is 3 now"),
        ({"optim": {"lr": 0.5}}, "recipe.optim.lr was 0.001 and is 0.5 now"),
        ({"max_steps": 2}, "recipe.max_steps was 1 and is 2 now"),
        ({"loss": {"kl": 0.5}}, "recipe.loss.kl was 1.0 and is 0.5 now"),
    ],
)
def test_resuming_under_another_recipe(
    changes: dict[str, Any], named: str, finished: Path, tars: list[Path], full_path: Path
) -> None:
    given = {"max_steps": 1, **changes}
    if "loss" not in changes:
        given["loss"] = {"layer_map": {0: 0, 1: 1}}

    assert named in error_line(train(finished, tars, full_path, "--resume", **given))


def test_resuming_on_other_samples(finished: Path, tars: list[Path], full_path: Path) -> None:
    line = error_line(train(finished, tars[:1], full_path, "--resume", max_steps=1))

    assert "data.samples was 24 and is 14 now" in line


def test_resuming_without_the_cache(finished: Path, tars: list[Path]) -> None:
    assert "cache was " in error_line(train(finished, tars, None, "--resume", max_steps=1))


def test_resuming_with_another_student(
    finished: Path, tars: list[Path], full_path: Path, tmp_path: Path
) -> None:
    student = student_copy(tmp_path / "student")
    tensors = torch.load(STUDENT / "pytorch_model.bin", weights_only=True)
    tensors["model.norm.weight"][0] += 1
    torch.save(tensors, student / "pytorch_model.bin")

    line = error_line(
        train(finished, tars, full_path, "--resume", "--student", student, max_steps=1)
    )

    assert "student_weights was '" in line
