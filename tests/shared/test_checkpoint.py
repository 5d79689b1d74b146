"""Model folders: what is written reads back, and only what is asked for is read."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from shared.checkpoint import SETTINGS, ModelFolder, copy_settings, weights_digest, write_weights
from shared.errors import CheckpointError
from shared.mobilevlm import load_model, to_ours, to_published
from tests.support import CLIP, TEACHER, teacher_copy, teacher_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0), "c": torch.tensor(3)}


def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_written_weights_read_back(tmp_path: Path, form: str) -> None:
    write_weights(folder(tmp_path), TENSORS, form)
    opened = ModelFolder(str(tmp_path))

    found = opened.read(["a", "c"])

    assert set(opened.tensor_files()) == set(TENSORS)
    assert set(found) == {"a", "c"}
    assert torch.equal(found["a"], TENSORS["a"])


def test_a_written_bin_holds_no_more_than_its_tensors(tmp_path: Path) -> None:
    """A view of a large tensor must not bring the large one with it."""
    large = torch.zeros(1000, 1000)

    write_weights(folder(tmp_path), {"a": large[:2]}, "bin")

    assert (tmp_path / "pytorch_model.bin").stat().st_size < 20_000


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    write_weights(folder(tmp_path), TENSORS, "bin")

    with pytest.raises(CheckpointError, match="5 tensors are missing: q, r, s and 2 more"):
        ModelFolder(str(tmp_path)).read("aqrstu")


def test_safetensors_are_preferred_to_a_pickle(tmp_path: Path) -> None:
    write_weights(folder(tmp_path), {"a": torch.zeros(1)}, "bin")
    write_weights(tmp_path, {"a": torch.ones(1)}, "safetensors")

    assert ModelFolder(str(tmp_path)).read(["a"])["a"].item() == 1


@pytest.mark.parametrize("name", ["../x", "/nowhere/x", "a/b/c", "~/x", "x", "."])
def test_a_name_that_is_no_hub_id_is_a_missing_folder(name: str) -> None:
    if name == ".":
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            ModelFolder(name)
    else:
        with pytest.raises(CheckpointError, match="no such folder"):
            ModelFolder(name)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), LocalEntryNotFoundError("cannot reach the hub"),
     ConnectionError("reset by peer")],
    ids=["a full disk", "no hub", "a lost connection"],
)  # fmt: skip
def test_weights_that_cannot_be_fetched_are_named_with_the_reason(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(_name: str, file: str) -> str:
        if file.endswith(".index.json"):
            raise EntryNotFoundError("404")
        raise error

    copy_settings(TEACHER, tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)

    with pytest.raises(CheckpointError, match=r"org/model: model\.safetensors cannot be"):
        ModelFolder("org/model").tensor_files()


def test_a_model_that_was_fetched_once_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(_name: str, file: str) -> str:
        raise LocalEntryNotFoundError(f"asked for {file}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(TEACHER))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    found, here = ModelFolder("org/model"), ModelFolder(str(TEACHER))

    assert found.tensor_files() == here.tensor_files()
    (name, *_) = here.tensor_files()
    assert found.read([name])[name].equal(here.read([name])[name])


def test_a_model_without_weights_on_the_hub_is_said_to_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(_name: str, _file: str) -> str:
        raise EntryNotFoundError("404")

    copy_settings(TEACHER, tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)

    with pytest.raises(CheckpointError, match="org/model: no weights"):
        ModelFolder("org/model").tensor_files()


def test_the_digest_depends_on_names_types_shapes_and_values_only() -> None:
    digest = weights_digest(TENSORS)

    assert weights_digest(dict(reversed(TENSORS.items()))) == digest
    strided = torch.zeros(3, 2).T.copy_(TENSORS["a"])
    assert not strided.is_contiguous()
    assert weights_digest({**TENSORS, "a": strided}) == digest
    for changed in (TENSORS["a"] + 1e-6, TENSORS["a"].double(), TENSORS["a"].reshape(3, 2)):
        assert weights_digest({**TENSORS, "a": changed}) != digest
    assert weights_digest({"x": TENSORS["a"]}) != weights_digest({"y": TENSORS["a"]})


def test_bfloat16_weights_have_a_digest() -> None:
    assert weights_digest({"a": torch.ones(3, dtype=torch.bfloat16)})


def test_settings_are_copied_whole_and_missing_ones_left_out(tmp_path: Path) -> None:
    copy_settings(TEACHER, tmp_path, leave_out=("config.json",))

    expected = {name for name in SETTINGS if (TEACHER / name).is_file()} - {"config.json"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert (tmp_path / "tokenizer.model").read_bytes() == (TEACHER / "tokenizer.model").read_bytes()


def test_names_map_there_and_back() -> None:
    for name in teacher_tensors():
        assert to_published(to_ours(name)) == name


def test_a_loaded_model_has_every_tensor_of_its_folder() -> None:
    state = load_model(ModelFolder(str(TEACHER)), str(CLIP)).published_state()
    stored = teacher_tensors()

    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor), name


def test_a_loaded_model_is_a_copy_of_the_file(tmp_path: Path) -> None:
    teacher = teacher_copy(tmp_path / "teacher")
    before = (teacher / "pytorch_model.bin").read_bytes()

    model = load_model(ModelFolder(str(teacher)), str(CLIP))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)

    assert (teacher / "pytorch_model.bin").read_bytes() == before
    assert not (ModelFolder(str(teacher)).read(["lm_head.weight"])["lm_head.weight"] == 7).any()


def test_a_llama_without_vision_needs_a_named_tower(tmp_path: Path) -> None:
    teacher = teacher_copy(tmp_path / "llama")
    path = teacher / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("mm_")}))

    with pytest.raises(CheckpointError, match="name one with --vision-tower"):
        load_model(ModelFolder(str(teacher)))
    assert load_model(ModelFolder(str(teacher)), str(CLIP)).width == 64
