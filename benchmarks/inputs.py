"""Teachers and tars for benchmarks: random weights and pictures, of plausible sizes."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig

from shared.mobilevlm import MULTIMODAL_FIELDS, MobileVLM, VLMConfig
from tests.support import CLIP, TEACHER, annotation, sample, write_tar


@dataclass(frozen=True, kw_only=True)
class TeacherSize:
    """Sizes of a MobileVLM."""

    layers: int = 32
    "Of the decoder."
    width: int = 1024
    "Of the decoder."
    heads: int = 16
    "Of the decoder."
    vocabulary: int = 32000
    "Of the decoder."
    tower_layers: int = 12
    "Of the tower, all but the last of which run."
    tower_width: int = 384
    "Of the tower: ViT-S/14 at 336 pixels. To this decoder it is what ViT-L is to a 7B one."


SMALL = TeacherSize(layers=2, width=64, heads=4, vocabulary=512, tower_layers=2, tower_width=32)
"For a run of seconds."


def write_teacher(folder: Path, size: TeacherSize) -> str:
    """A random teacher in the published layout, weights in two `.bin`; says what it is."""
    clip = folder / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(CLIP, clip, ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TEACHER / name, folder)
    tower = CLIPVisionConfig(
        hidden_size=size.tower_width, intermediate_size=4 * size.tower_width,
        num_hidden_layers=size.tower_layers, num_attention_heads=max(1, size.tower_width // 64),
        image_size=336, patch_size=14,
    )  # fmt: skip
    llama = LlamaConfig(
        hidden_size=size.width, intermediate_size=int(size.width * 2.6875),
        num_hidden_layers=size.layers, num_attention_heads=size.heads, vocab_size=size.vocabulary,
        max_position_embeddings=2048,
    )  # fmt: skip
    published = {
        **llama.to_dict(), **MULTIMODAL_FIELDS, "mm_vision_tower": "clip",
        "mm_hidden_size": size.tower_width,
    }  # fmt: skip
    (clip / "config.json").write_text(json.dumps(tower.to_dict()))
    (folder / "config.json").write_text(json.dumps(published))
    torch.manual_seed(0)
    model = MobileVLM(VLMConfig(published=published, tower=tower, tower_folder=clip))
    _write_weights(folder, model.published_state())
    count = {
        "tower and projector": [*model.tower.parameters(), *model.projector.parameters()],
        "decoder": list(model.llm.parameters()),
    }
    sizes = {name: sum(p.numel() for p in found) / 1e6 for name, found in count.items()}
    return (
        f"teacher: {size.layers} layers, width {size.width}, {size.heads} heads, vocabulary "
        f"{size.vocabulary}: {sizes['decoder']:.0f} M parameters; tower and projector: width "
        f"{size.tower_width}, {size.tower_layers - 1} of {size.tower_layers} layers run, "
        f"24 x 24 patches: {sizes['tower and projector']:.0f} M; float32"
    )


def _write_weights(folder: Path, state: dict[str, torch.Tensor]) -> None:
    names = list(state)
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:])):
        file = f"pytorch_model-{number}.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_tars(folder: Path, *, tars: int, samples: int, size: tuple[int, int]) -> list[Path]:
    """Tars of `samples` conversations, each about a JPEG of its own, about 128 text rows each."""
    chance = np.random.default_rng(0)
    return [
        write_tar(folder / f"t-{number:03d}.tar", *_samples(chance, number, samples, size))
        for number in range(tars)
    ]


def _samples(
    chance: np.random.Generator, tar: int, samples: int, size: tuple[int, int]
) -> Iterator[Any]:
    for number in range(samples):
        words = chance.integers(25, 85)
        note = annotation("<image>\nwhat color is the boat", "red boat " * int(words))
        yield sample(f"s{tar}-{number}", note, photo(chance, size), suffix="jpg")


def photo(chance: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG as heavy as a photo of that size: soft shapes and some noise."""
    width, height = size
    coarse = chance.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    noisy = soft + chance.normal(0, 8, soft.shape)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
