"""Teachers, specs and options that make no sense: one clear line, and no traceback."""

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.support import (
    ALIGN_ONLY,
    CLIP,
    FULL,
    TEACHER,
    command,
    denied,
    error_line,
    sample,
    teacher_copy,
    teacher_tensors,
    write_tar,
)


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "t.tar", sample("boat"))


def refused(
    tmp_path: Path, tar: Path, *options: str, spec: Mapping[str, Any] | Path = FULL,
    teacher: Path = TEACHER,
) -> str:  # fmt: skip
    line = error_line(command(tmp_path / "cache", tar, spec, teacher, *options))
    assert not list(tmp_path.glob("cache/records/*"))
    return line


# Teachers


def test_a_teacher_that_is_no_folder(tmp_path: Path, tar: Path) -> None:
    assert "nowhere: no such folder" in refused(tmp_path, tar, teacher=tmp_path / "nowhere")


def test_a_teacher_without_config(tmp_path: Path, tar: Path) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    (teacher / "config.json").unlink()

    assert "no config.json" in refused(tmp_path, tar, teacher=teacher)


@pytest.mark.parametrize("text", ["", "[]", "{boat", "\ud800".encode("utf-8", "surrogatepass")])
def test_a_teacher_whose_config_is_no_json_object(
    tmp_path: Path, tar: Path, text: str | bytes
) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    (teacher / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)

    assert "config.json" in refused(tmp_path, tar, teacher=teacher)


def test_a_teacher_folder_that_may_not_be_searched(tmp_path: Path, tar: Path) -> None:
    teacher = teacher_copy(tmp_path / "teacher")

    with denied(teacher):
        line = refused(tmp_path, tar, teacher=teacher)

    assert f"{teacher}/config.json: cannot be read (Permission denied)" in line


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin", "tokenizer.model"])
def test_a_teachers_file_that_may_not_be_read_is_named_and_not_called_damaged(
    tmp_path: Path, tar: Path, name: str
) -> None:
    teacher = teacher_copy(tmp_path / "teacher")

    with denied(teacher / name):
        line = refused(tmp_path, tar, teacher=teacher)

    assert line.endswith(f"{teacher / name}: cannot be read (Permission denied)")


def test_safetensors_that_may_not_be_read_are_not_called_damaged(tmp_path: Path, tar: Path) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    save_file({"a": torch.zeros(1)}, teacher / "model.safetensors")

    with denied(teacher / "model.safetensors"):
        line = refused(tmp_path, tar, teacher=teacher)

    assert line.endswith("model.safetensors: cannot be read (Permission denied)")


def test_image_settings_that_may_not_be_read(tmp_path: Path, tar: Path) -> None:
    tower = tmp_path / "tower"
    shutil.copytree(CLIP, tower)

    with denied(tower / "preprocessor_config.json"):
        line = refused(tmp_path, tar, "--vision-tower", str(tower))

    assert line.endswith("preprocessor_config.json: cannot be read (Permission denied)")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", None),
        ("hidden_size", "64"),
        ("mm_projector_type", "mlp2x_gelu"),
        ("mm_hidden_size", 48),
        ("mm_vision_select_layer", None),
        ("mm_vision_select_layer", -9),
        ("mm_vision_select_feature", "cls_patch"),
        ("rms_norm_eps", "x"),
        ("hidden_act", "none"),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"type": "none", "factor": 2.0}),
        ("tie_word_embeddings", True),
        ("eos_token_id", [2, 3]),
        ("eos_token_id", None),
    ],
)
def test_a_config_field_that_cannot_be_is_named(
    tmp_path: Path, tar: Path, field: str, value: object
) -> None:
    teacher = teacher_copy(tmp_path / "teacher", config={field: value})

    assert field.removesuffix("_scaling") in refused(tmp_path, tar, teacher=teacher)


def test_a_teacher_without_a_vision_tower_in_reach(tmp_path: Path, tar: Path) -> None:
    line = refused(tmp_path, tar, "--vision-tower", str(tmp_path / "nowhere"))

    assert "nowhere: no such folder" in line


def test_a_teacher_without_weights(tmp_path: Path, tar: Path) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    (teacher / "pytorch_model.bin").unlink()

    assert "no weights" in refused(tmp_path, tar, teacher=teacher)


def test_a_teacher_with_missing_tensors(tmp_path: Path, tar: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    teacher = teacher_copy(tmp_path / "teacher", edit=lambda tensors: tensors.pop(name))

    assert f"1 tensors are missing: {name}" in refused(tmp_path, tar, teacher=teacher)


def test_a_teacher_with_shapes_that_do_not_fit(tmp_path: Path, tar: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    teacher = teacher_copy(
        tmp_path / "teacher", edit=lambda tensors: tensors.update({name: torch.zeros(64, 32)})
    )

    line = refused(tmp_path, tar, teacher=teacher)

    assert f"{name} has shape [64, 32], but the config asks for [64, 64]" in line


def test_a_tower_with_shapes_that_do_not_fit(tmp_path: Path, tar: Path) -> None:
    tower = tmp_path / "tower"
    shutil.copytree(CLIP, tower)
    config = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))

    line = refused(tmp_path, tar, "--vision-tower", str(tower))

    assert "but the config asks for [48" in line


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_that_is_more_than_tensors_is_refused_and_not_run(
    tmp_path: Path, tar: Path
) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    content = {**teacher_tensors(), "bomb": Bomb(tmp_path / "boom")}
    torch.save(content, teacher / "pytorch_model.bin")

    assert "damaged, or more than tensors in it" in refused(tmp_path, tar, teacher=teacher)
    assert not (tmp_path / "boom").exists()
    pickle.loads(pickle.dumps(content["bomb"]))
    assert (tmp_path / "boom").exists()  # so the bomb was a real one


@pytest.mark.parametrize(
    "content",
    [b"", b"boat" * 100, pickle.dumps({"a": 1}), (TEACHER / "pytorch_model.bin").read_bytes()[:99]],
)
def test_a_bin_that_is_no_checkpoint_is_refused(tmp_path: Path, tar: Path, content: bytes) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    (teacher / "pytorch_model.bin").write_bytes(content)

    assert "pytorch_model.bin" in refused(tmp_path, tar, teacher=teacher)


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 5])
def test_a_bin_that_is_no_mapping_of_tensors_is_refused(
    tmp_path: Path, tar: Path, content: object
) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    torch.save(content, teacher / "pytorch_model.bin")

    assert "pytorch_model.bin" in refused(tmp_path, tar, teacher=teacher)


@pytest.mark.parametrize("content", [b"", b"boat" * 100, b"\xff" * 8 + b"{}"])
def test_a_damaged_safetensors_is_refused(tmp_path: Path, tar: Path, content: bytes) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    (teacher / "model.safetensors").write_bytes(content)

    assert "model.safetensors: damaged" in refused(tmp_path, tar, teacher=teacher)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_an_index_that_names_the_wrong_file_is_an_error(
    tmp_path: Path, tar: Path, form: str
) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    (teacher / "pytorch_model.bin").unlink()
    single = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[form]
    tensors = teacher_tensors()
    lost = tensors.pop("model.embed_tokens.weight")
    if form == "bin":
        torch.save(tensors, teacher / "part")
    else:
        save_file(tensors, teacher / "part.safetensors")
    file = "part" if form == "bin" else "part.safetensors"
    weight_map = dict.fromkeys([*tensors, "model.embed_tokens.weight"], file)
    (teacher / f"{single}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert lost.numel()

    line = refused(tmp_path, tar, teacher=teacher)

    assert "model.embed_tokens.weight" in line
    assert file in line


@pytest.mark.parametrize("index", [{}, {"weight_map": 5}, {"weight_map": {"a": "../../secret"}}])
def test_a_bad_index_is_an_error(tmp_path: Path, tar: Path, index: object) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    (teacher / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    assert "pytorch_model.bin.index.json" in refused(tmp_path, tar, teacher=teacher)


def test_a_shard_file_that_is_missing_is_named(tmp_path: Path, tar: Path) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    weight_map = dict.fromkeys(teacher_tensors(), "part-1.bin")
    (teacher / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    assert "part-1.bin is missing" in refused(tmp_path, tar, teacher=teacher)


@pytest.mark.parametrize("content", [None, b"", b"boat"])
def test_a_tokenizer_that_is_missing_or_damaged(
    tmp_path: Path, tar: Path, content: bytes | None
) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    (teacher / "tokenizer.model").unlink()
    if content is not None:
        (teacher / "tokenizer.model").write_bytes(content)

    assert "tokenizer" in refused(tmp_path, tar, teacher=teacher)


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_tokenizer_with_more_words_than_the_teacher_knows(
    tmp_path: Path, tar: Path, options: tuple[str, ...]
) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:300].clone()

    teacher = teacher_copy(tmp_path / "teacher", edit=cut, config={"vocab_size": 300})

    line = error_line(command(tmp_path / "cache", tar, ALIGN_ONLY, teacher, *options))

    assert "the tokenizer gives id 511" in line
    assert "vocab_size is 300" in line


@pytest.mark.parametrize("content", [None, "", "[]", '{"size": "large"}'])
def test_image_processor_settings_that_are_missing_or_damaged(
    tmp_path: Path, tar: Path, content: str | None
) -> None:
    tower = tmp_path / "tower"
    shutil.copytree(CLIP, tower)
    (tower / "preprocessor_config.json").unlink()
    if content is not None:
        (tower / "preprocessor_config.json").write_text(content)

    line = refused(tmp_path, tar, "--vision-tower", str(tower))

    assert "preprocessor_config.json" in line


# Specs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visiontokens": {}}, "unknown key 'visiontokens'; nearest known: 'vision_tokens'"),
        ({"template": "v2"}, "template: 'v2' is not one of plain, v1"),
        ({"image_aspect": "crop"}, "image_aspect: 'crop' is not one of pad, square"),
        (
            {"attention": {"layers": [3], "encoding": "float32"}},
            "attention layer 3, but the teacher",
        ),
        (
            {"attention": {"layers": [-1], "encoding": "float32"}},
            "each of layers must be 0 to 999, found -1",
        ),
        ({"attention": {"layers": [], "encoding": "float32"}}, "layers is empty"),
        ({"attention": {"layers": [0], "encoding": "int3"}}, "'int3' is not one of float32"),
        ({"attention": {"layer": [0], "encoding": "float32"}}, "nearest known: 'layers'"),
        ({"logprobs": {"top_k": 513, "encoding": "float32"}}, "top_k 513, but the teacher's"),
        ({"logprobs": {"top_k": 0, "encoding": "float32"}}, "top_k must be 1 to 33554432, found 0"),
        ({"max_tokens": "many"}, "max_tokens: expected int, found 'many'"),
        ({"attention": None, "vision_tokens": None, "logprobs": None}, "names no signal"),
    ],
)
def test_a_spec_that_makes_no_sense(
    tmp_path: Path, tar: Path, change: dict[str, Any], message: str
) -> None:
    assert message in refused(tmp_path, tar, spec={**FULL, **change})


def test_a_spec_without_a_template(tmp_path: Path, tar: Path) -> None:
    spec = {key: value for key, value in FULL.items() if key != "template"}

    assert "missing key 'template'" in refused(tmp_path, tar, spec=spec)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "boat", b"\xff\xfe"])
def test_a_spec_file_that_is_no_mapping(tmp_path: Path, tar: Path, text: str | bytes) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)

    assert "spec.yaml: " in refused(tmp_path, tar, spec=path)


def test_a_spec_file_that_is_missing(tmp_path: Path, tar: Path) -> None:
    line = refused(tmp_path, tar, spec=tmp_path / "nowhere.yaml")

    assert "nowhere.yaml: no such spec file" in line


def test_the_specs_that_ship_are_specs(tmp_path: Path, tar: Path) -> None:
    for path in Path(__file__).parents[2].joinpath("cache_specs").glob("*.yaml"):
        small = yaml.safe_load(path.read_text())
        if "logprobs" in small:
            small["logprobs"]["top_k"] = 8
        result = command(tmp_path / path.stem, tar, small)
        assert result.exit_code == 0, result.output


# Options


def test_an_out_that_cannot_be_written(tmp_path: Path, tar: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    line = error_line(command(tmp_path / "file" / "cache", tar, tmp_spec(tmp_path)))

    assert line.endswith("file/cache: cannot be read (Not a directory)")
    assert str(tmp_path / "file" / "cache") in line


def tmp_spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(ALIGN_ONLY))
    return path


@pytest.mark.parametrize("device", ["boat", "cuda:99", "cpu:x", "meta"])
def test_a_device_that_is_not_there(tmp_path: Path, tar: Path, device: str) -> None:
    assert f"--device {device}: " in refused(tmp_path, tar, "--device", device)


def test_a_batch_that_the_device_cannot_hold_is_one_line(
    tmp_path: Path, tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("cache_builder.teacher.Teacher.vision_tokens", too_much)

    line = refused(tmp_path, tar, "--batch-size", "32")

    assert f"{tar}: batches of 32 need more memory than cpu has" in line
    assert "smaller --batch-size" in line
