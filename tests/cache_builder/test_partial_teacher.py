"""The teacher is read and run only as deep as the spec asks."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cache_builder.teacher import needed_tensors
from shared.cache import open_cache
from shared.checkpoint import ModelFolder
from shared.mobilevlm import read_config
from shared.spec import CacheSpec
from tests.support import (
    ALIGN_ONLY,
    CLIP,
    FULL,
    LOGPROBS,
    TEACHER,
    build,
    builder,
    command,
    error_line,
    record,
    sample,
    stored_digests,
    teacher_copy,
    teacher_tensors,
    text_sample,
    write_tar,
)

TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = {
    f"model.mm_projector.{name}.{kind}"
    for name in ("mlp.mlp.0", "mlp.mlp.2", "peg.peg.0")
    for kind in ("weight", "bias")
}
EMBEDDING = "model.embed_tokens.weight"


def spec(**changes: Any) -> CacheSpec:
    return CacheSpec.from_dict({"template": "v1", "image_aspect": "pad", **changes})


def attention(*layers: int) -> dict[str, Any]:
    return {"layers": list(layers), "encoding": "float32"}


def tower_names() -> set[str]:
    """The tower to layer -2 of 3: embeddings, the norm before the layers, layers 0 and 1."""
    parts = (f"{TOWER}embeddings.", f"{TOWER}pre_layrnorm.")
    layers = tuple(f"{TOWER}encoder.layers.{n}." for n in (0, 1))
    return {name for name in teacher_tensors() if name.startswith(parts + layers)}


def decoder_names(layer: int, *parts: str) -> set[str]:
    prefix = f"model.layers.{layer}."
    return {
        name
        for name in teacher_tensors()
        if name.startswith(tuple(prefix + part for part in parts or ("",)))
    }


def scatter(folder: Path, form: str, keep: Callable[[str], bool] = lambda name: True) -> Path:
    """The reference teacher with each tensor in a file of its own; only `keep` ones exist."""
    teacher_copy(folder)
    (folder / "pytorch_model.bin").unlink()
    single = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[form]
    weight_map = {}
    for number, (name, tensor) in enumerate(sorted(teacher_tensors().items())):
        weight_map[name] = f"part-{number:05d}.{form}"
        if keep(name):
            write_part(folder / weight_map[name], name, tensor)
    (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_part(path: Path, name: str, tensor: Tensor) -> None:
    if path.suffix == ".bin":
        torch.save({name: tensor}, path)
    else:
        save_file({name: tensor}, path)


def needed_of(wanted: Mapping[str, Any]) -> set[str]:
    return needed_tensors(
        CacheSpec.from_dict(wanted), read_config(ModelFolder(str(TEACHER)), str(CLIP))
    )


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "t.tar", sample("boat"), text_sample("sky"))


def test_align_only_needs_the_tower_the_projector_and_one_layers_queries_and_keys() -> None:
    one_layer = decoder_names(0, "input_layernorm.", "self_attn.q_proj.", "self_attn.k_proj.")
    assert len(one_layer) == 3

    found = needed_of(ALIGN_ONLY)

    assert found == tower_names() | PROJECTOR | {EMBEDDING} | one_layer


def test_vision_tokens_alone_need_no_decoder() -> None:
    found = needed_of(spec(vision_tokens={"encoding": "float32"}).to_dict())

    assert found == tower_names() | PROJECTOR


def test_a_deeper_layer_needs_whole_layers_before_it() -> None:
    found = needed_of(spec(attention=attention(0, 2)).to_dict())

    last = decoder_names(2, "input_layernorm.", "self_attn.q_proj.", "self_attn.k_proj.")
    whole = decoder_names(0) | decoder_names(1)
    assert found == tower_names() | PROJECTOR | {EMBEDDING} | whole | last


def test_log_probabilities_need_the_whole_decoder_but_not_the_towers_last_layer() -> None:
    found = needed_of(spec(logprobs=LOGPROBS).to_dict())

    decoder = {name for name in teacher_tensors() if not name.startswith((TOWER, *PROJECTOR))}
    assert "lm_head.weight" in decoder
    assert found == tower_names() | PROJECTOR | decoder


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize(
    "wanted",
    [ALIGN_ONLY, spec(vision_tokens={"encoding": "float32"}).to_dict()],
    ids=["align-only", "vision-tokens"],
)
def test_with_every_file_deleted_that_is_not_needed_the_bytes_are_the_same(
    tmp_path: Path, tar: Path, form: str, wanted: Mapping[str, Any]
) -> None:
    needed = needed_of(wanted)
    teacher = scatter(tmp_path / "teacher", form, keep=lambda name: name in needed)
    assert len(list(teacher.glob("part-*"))) == len(needed) < len(teacher_tensors())

    build(tmp_path / "full", tar, wanted)
    build(tmp_path / "partial", tar, wanted, teacher)

    assert stored_digests(tmp_path / "full") == stored_digests(tmp_path / "partial")
    assert record(tmp_path / "full", "t").identity == record(tmp_path / "partial", "t").identity


def test_a_file_that_is_needed_cannot_be_missing(tmp_path: Path, tar: Path) -> None:
    needed = needed_of(ALIGN_ONLY)
    lost = "model.layers.0.self_attn.k_proj.weight"
    teacher = scatter(tmp_path / "t", "safetensors", lambda name: name in needed - {lost})

    line = error_line(command(tmp_path / "cache", tar, ALIGN_ONLY, teacher))

    assert f"is missing; it holds {lost}" in line


def test_tensors_that_are_not_needed_do_not_change_the_identity(tmp_path: Path) -> None:
    changed = teacher_copy(
        tmp_path / "teacher",
        edit=lambda tensors: tensors.update({"lm_head.weight": torch.zeros(512, 64)}),
    )

    assert builder(ALIGN_ONLY, changed).identity == builder(ALIGN_ONLY).identity
    assert builder(FULL, changed).identity != builder(FULL).identity


def test_the_identity_is_that_of_the_weights_not_of_their_files(tmp_path: Path) -> None:
    forms = [scatter(tmp_path / form, form) for form in ("bin", "safetensors")]
    single = teacher_copy(tmp_path / "single")
    (single / "pytorch_model.bin").unlink()
    save_file(teacher_tensors(), single / "model.safetensors")

    identities = [builder(FULL, folder).identity for folder in (*forms, single, TEACHER)]

    assert all(identity == identities[0] for identity in identities)


def test_the_towers_weights_may_come_from_its_own_folder(tmp_path: Path, tar: Path) -> None:
    def without_tower(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(TOWER)]:
            del tensors[name]

    teacher = teacher_copy(tmp_path / "teacher", edit=without_tower)
    own = teacher_tensors()
    prefix = "model.vision_tower.vision_tower."
    same = {name.removeprefix(prefix): own[name] for name in own if name.startswith(prefix)}
    shutil.copytree(CLIP, tmp_path / "tower")
    save_file(same, tmp_path / "tower" / "model.safetensors")

    build(tmp_path / "inside", tar)
    build(tmp_path / "beside", tar, teacher=teacher, vision_tower=tmp_path / "tower")

    assert stored_digests(tmp_path / "inside") == stored_digests(tmp_path / "beside")


def test_a_tower_inside_the_models_folder_is_found_without_being_named(tmp_path: Path) -> None:
    teacher = teacher_copy(tmp_path / "teacher", config={"mm_vision_tower": "clip"})
    shutil.copytree(CLIP, teacher / "clip")

    loaded = builder(ALIGN_ONLY, teacher, vision_tower=None)

    assert loaded.identity == builder(ALIGN_ONLY).identity  # nor does it matter where it lies


def test_layers_that_are_not_asked_for_change_nothing(tmp_path: Path, tar: Path) -> None:
    deep = {**FULL, "attention": attention(0, 2)}
    build(tmp_path / "one", tar, ALIGN_ONLY)
    build(tmp_path / "two", tar, deep)

    one, two = open_cache(tmp_path / "one").read("boat"), open_cache(tmp_path / "two").read("boat")

    assert set(two.attention) == {0, 2}
    np.testing.assert_array_equal(one.attention[0], two.attention[0])
    assert not np.allclose(two.attention[0], two.attention[2], rtol=1e-2)
    assert one.top_ids is None
