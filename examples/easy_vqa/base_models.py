"""What the demo's models start from, made here from seeds: a tokenizer, a CLIP tower and two Llamas
with random weights.

They have the layout of published ones, so `train-student --student LLAMA --vision-tower CLIP` reads
them as it reads a real Vicuna and a real CLIP.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from examples.easy_vqa.prepare import Question
from shared.checkpoint import ModelFolder, write_weights
from shared.images import ImageProcessor
from shared.prompt import ASSISTANT, SYSTEM, USER

VOCABULARY = 512
"Tokens: 3 special ones, 256 bytes, and pieces of the data set's few words."
CLIP = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "image_size": 96, "patch_size": 8, "projection_dim": 128,
}  # fmt: skip
"12 x 12 patches, so that LDPv2's pooling to 12 x 12 changes nothing. The last layer never runs."
TEACHER = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
STUDENT = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "initializer_range": 0.1,
}  # fmt: skip
"Its weights start at about 1 / sqrt(width); Llama's 0.02 is meant for a width of thousands."

_TOWER = "model.vision_tower.vision_tower."
_CUT = "\t"
"Marks where a piece may not go across; in no text of the data set."


def train_tokenizer(questions: Sequence[Question]) -> bytes:
    """A sentencepiece model with Llama's rules (BPE, bytes for unknown characters, ids 0 1 2).

    Pieces may be long and hold spaces, so the system prompt, the same in every sample, becomes one
    token; questions are cut into words, so that each word keeps attention of its own.
    """
    texts = sorted({(question.text, question.answer) for question in questions})
    before, after = [SYSTEM + USER.rstrip(), " "], f" {ASSISTANT.rstrip()}"
    lines = (_CUT.join([*before, *_words(text), after, f" {answer}"]) for text, answer in texts)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=VOCABULARY,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_by_whitespace=False, split_by_unicode_script=False, max_sentencepiece_length=512,
        pretokenization_delimiter=_CUT, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def _words(text: str) -> list[str]:
    return re.findall(r" ?\w+|\W", text)


def write_llama(folder: Path, shape: Mapping[str, float], tokenizer: bytes, *, seed: int) -> None:
    """A Llama with random weights and the tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **shape, vocab_size=VOCABULARY, num_key_value_heads=shape["num_attention_heads"],
        max_position_embeddings=2048, rms_norm_eps=1e-5, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    folder.mkdir(parents=True)
    fields = {
        name: config.to_dict()[name]
        for name in (
            *shape, "vocab_size", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
            "hidden_act", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
            "tie_word_embeddings", "use_cache",
        )
    }  # fmt: skip
    architecture = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    # rope_theta in the plain form that the original code and older transformers read.
    _write_json(folder / "config.json", {**architecture, **fields, "rope_theta": 10000.0})
    write_weights(folder, model.state_dict(), "safetensors")
    write_tokenizer(folder, tokenizer)


def write_tokenizer(folder: Path, tokenizer: bytes) -> None:
    """The three tokenizer files of a published Llama."""
    (folder / "tokenizer.model").write_bytes(tokenizer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    tokens = {name: {"content": content, **flags} for name, content in names.items()}
    _write_json(folder / "special_tokens_map.json", tokens)
    settings = {
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "legacy": None, "model_max_length": 2048, "pad_token": None, "padding_side": "right",
        "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer",
    }  # fmt: skip
    added = {name: {"__type": "AddedToken", **token} for name, token in tokens.items()}
    _write_json(folder / "tokenizer_config.json", {**settings, **added})


def write_clip(folder: Path, *, seed: int) -> None:
    """A CLIP vision tower with random weights."""
    torch.manual_seed(seed)
    model = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    folder.mkdir(parents=True)
    weights = {f"vision_model.{name}": tensor for name, tensor in model.state_dict().items()}
    write_weights(folder, weights, "safetensors")
    _write_clip_settings(folder)


def write_clip_of(model: Path, folder: Path) -> None:
    """The tower of a trained MobileVLM as a CLIP folder: teacher and student share it, frozen."""
    source = ModelFolder(str(model))
    names = [name for name in source.tensor_files() if name.startswith(_TOWER)]
    weights = {name.removeprefix(_TOWER): tensor for name, tensor in source.read(names).items()}
    folder.mkdir(parents=True)
    write_weights(folder, weights, "safetensors")
    _write_clip_settings(folder)


def _write_clip_settings(folder: Path) -> None:
    architecture = {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3,
    }  # fmt: skip
    _write_json(folder / "config.json", {**architecture, **CLIP})
    size = CLIP["image_size"]
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    _write_json(folder / "preprocessor_config.json", preprocessor)
    ImageProcessor(folder, "pad")  # refuses settings that it does not know


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
