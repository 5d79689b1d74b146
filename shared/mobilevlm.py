"""MobileVLM V2 on transformers' own CLIP and Llama classes: CLIP tower + LDPv2 + Llama.

Published folders say everything about the language model and the projector in `config.json`; the
tower's architecture and image settings come from the CLIP folder that `mm_vision_tower` names.
Published tensor names differ from transformers' module names; `_PREFIXES` is the one place that
knows how.

Axes: B sample, N image, P patch, V vision token, C channel, T token.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shared.checkpoint import ModelFolder
from shared.errors import CheckpointError
from shared.progress import progress
from shared.readable import is_folder

GRID = 12
"LDPv2 pools the patches to GRID x GRID vision tokens, whatever the tower (the original fixes it)."
NUM_VISION = GRID * GRID

_TOWER = "model.vision_tower.vision_tower.vision_model."
_PROJECTOR = "model.mm_projector."
_PREFIXES = {_TOWER: "tower.", _PROJECTOR: "projector.", "lm_head.": "llm.lm_head."}
"Published prefix -> ours; what is left, `model.*`, is `llm.model.*`."

MULTIMODAL_FIELDS = {
    "architectures": ["MobileLlamaForCausalLM"],
    "model_type": "mobilevlm",
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "mm_projector_lr": None,
    "mm_projector_type": "ldpnetv2",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
    "vision_tower_type": "clip",
}
"What a Llama's config.json gets when it becomes a MobileVLM (values of the published ones)."


_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class _FeatureIR(nn.Module):
    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(num_in, num_out), nn.GELU(), nn.Linear(num_out, num_out))


class _PositionInjection(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width))


class LDPv2(nn.Module):
    """MobileVLM V2's projector: pointwise MLP, pooling to 12 x 12, depthwise 3 x 3 plus input.

    Module names are those of the published keys (`mlp.mlp.0`, `peg.peg.0`).
    """

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.mlp = _FeatureIR(num_in, num_out)
        self.peg = _PositionInjection(num_out)

    def forward(self, patches_NPC: Float[Tensor, "N P patch_channel"]) -> Float[Tensor, "N V C"]:
        """Vision tokens of patch features; P must be a square number."""
        hidden_NPC = self.mlp.mlp(patches_NPC)
        size = round(hidden_NPC.shape[1] ** 0.5)
        grid_NCyx = hidden_NPC.transpose(1, 2).unflatten(2, (size, size))
        pooled_NCyx = nn.functional.adaptive_avg_pool2d(grid_NCyx, GRID)
        mixed_NCyx: Tensor = self.peg.peg(pooled_NCyx) + pooled_NCyx
        return mixed_NCyx.flatten(2).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class VLMConfig:
    """Everything that a published folder and its tower's folder say about the architecture."""

    published: Mapping[str, Any]
    "The folder's config.json, written back unchanged."
    tower: CLIPVisionConfig
    "The tower, with all its layers."
    tower_folder: Path
    "Where the tower's config and image processor settings were read."

    @property
    def llama(self) -> LlamaConfig:
        """The language model's config."""
        # A copy: transformers adds to the dictionary of the rotary embedding.
        return LlamaConfig(**{**deepcopy(self.published), "model_type": "llama", "dtype": None})

    @property
    def tower_layers(self) -> int:
        """Tower layers that run: `hidden_states[mm_vision_select_layer]` needs no more."""
        select = int(self.published["mm_vision_select_layer"])
        total = int(self.tower.num_hidden_layers)
        return select if select >= 0 else total + 1 + select


class MobileVLM(nn.Module):
    """The model. `passthrough` holds checkpoint tensors that nothing runs (the tower's last layer,
    say), so that a written folder has all that the read one had.
    """

    def __init__(self, config: VLMConfig, *, decoder_layers: int | None = None) -> None:
        """`decoder_layers`: build only so many (a partial teacher); by default all."""
        super().__init__()
        self.config = config
        tower = CLIPVisionConfig(
            **{**config.tower.to_dict(), "num_hidden_layers": config.tower_layers}
        )
        llama = config.llama
        if decoder_layers is not None:
            llama.num_hidden_layers = decoder_layers
        self.tower = CLIPVisionModel(tower)
        # The projector reads hidden states, not the pooled output.
        self.tower.post_layernorm = nn.Identity()
        self.projector = LDPv2(int(config.published["mm_hidden_size"]), int(llama.hidden_size))
        self.llm = LlamaForCausalLM(llama)
        self.passthrough: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Channels of the text embedding, C."""
        return int(self.llm.config.hidden_size)

    def encode_images(self, pixels: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N V C"]:
        """Vision tokens: patch features of the selected tower layer, through the projector."""
        return self.projector(self.patch_features(pixels))  # type: ignore[no-any-return]

    def patch_features(
        self, pixels: Float[Tensor, "N 3 S S"]
    ) -> Float[Tensor, "N P patch_channel"]:
        """The tower's patch tokens (CLS left out) at `mm_vision_select_layer`."""
        return self.tower(pixel_values=pixels).last_hidden_state[:, 1:]  # type: ignore[no-any-return]

    def embed(
        self,
        ids: Int[Tensor, "B T"],
        vision_mask: Bool[Tensor, "B T"],
        vision_tokens: Float[Tensor, "N V C"],
    ) -> Float[Tensor, "B T C"]:
        """Text embeddings with the vision tokens put in, image by image, where the mask says."""
        embedded = self.llm.get_input_embeddings()(ids)
        return embedded.masked_scatter(  # type: ignore[no-any-return]
            vision_mask[..., None], vision_tokens.to(embedded.dtype)
        )

    def published_state(self) -> dict[str, Tensor]:
        """All tensors under their published names, passthrough included."""
        own = {to_published(name): tensor for name, tensor in self.state_dict().items()}
        return {**self.passthrough, **own}

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        vision_tokens: Sequence[Float[Tensor, "V C"] | None],
        *,
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Greedy continuations, without the end token.

        Args:
            prompts: ids with -200 for the image.
            vision_tokens: of each prompt, None for text only.
        """
        from shared.sequence import splice  # the one place that knows how an image is expanded

        embeds = [
            splice(self.llm.get_input_embeddings(), ids, vision)
            for ids, vision in zip(prompts, vision_tokens, strict=True)
        ]
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        padded = pad(embeds)
        mask = pad([embed.new_ones(len(embed), dtype=torch.long) for embed in embeds])
        end = int(self.llm.config.eos_token_id)
        out = self.llm.generate(
            inputs_embeds=padded, attention_mask=mask, do_sample=False, num_beams=1,
            max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        return [row[: row.index(end)] if end in row else row for row in out.tolist()]


def read_config(folder: ModelFolder, vision_tower: str | None = None) -> VLMConfig:
    """The architecture of a MobileVLM folder, or of a Llama folder that is to become one.

    Args:
        vision_tower: folder or hub id of the CLIP tower; by default `mm_vision_tower`, looked for
            inside the model folder first.

    Raises:
        CheckpointError: a field is missing or not supported, or no tower can be found.
    """
    published = folder.config()
    if "mm_projector_type" not in published:
        if vision_tower is None:
            raise CheckpointError(
                f"{folder.name}: is a Llama without a vision tower; name one with --vision-tower"
            )
        published = {**_rope_as_published(published), **MULTIMODAL_FIELDS}
    if not str(published["mm_projector_type"]).startswith("ldpnetv2"):
        raise CheckpointError(
            f"{folder.name}: mm_projector_type {published['mm_projector_type']!r}, "
            "only ldpnetv2 is supported"
        )
    tower = _open_tower(folder, published, vision_tower)
    tower_config = tower.config()
    with _accepted(tower):
        clip = CLIPVisionConfig(**tower_config.get("vision_config", tower_config))
        _check_activation(clip.hidden_act)
    # A local tower goes along with what is exported, so its name is enough; a hub id stays one.
    published.setdefault("mm_vision_tower", tower.path.name if tower.is_local else tower.name)
    if published.setdefault("mm_hidden_size", clip.hidden_size) != clip.hidden_size:
        raise CheckpointError(
            f"{folder.name}: mm_hidden_size is {published['mm_hidden_size']}, "
            f"but the tower {tower.name} has {clip.hidden_size} channels"
        )
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(published.get(field), int):
            raise CheckpointError(f"{folder.name}: config.json has no {field}")
    _check_selection(folder, published, int(clip.num_hidden_layers))
    config = VLMConfig(published=published, tower=clip, tower_folder=tower.path)
    with _accepted(folder):
        _check_llama(config.llama)
    return config


def keep_float32() -> None:
    """Float32 models in float32: on a GPU, convolutions are rounded to 10 bits by default, and
    matrix products where an environment variable says so.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def load_model(folder: ModelFolder, vision_tower: str | None = None) -> MobileVLM:
    """A whole model in float32 on the CPU; a Llama folder gets a fresh projector.

    Raises:
        CheckpointError: tensors are missing or do not fit.
    """
    config = read_config(folder, vision_tower)
    model = empty_model(config)
    names = set(folder.tensor_files())
    state = folder.read(names)
    if not any(name.startswith(_TOWER) for name in names):
        state |= read_tower(config)
    if "mm_projector_type" not in folder.config():
        fresh = LDPv2(int(config.published["mm_hidden_size"]), model.width)
        state |= {_PROJECTOR + name: tensor for name, tensor in fresh.state_dict().items()}
    load_state(model, state, folder.name)
    return model


def empty_model(config: VLMConfig, *, decoder_layers: int | None = None) -> MobileVLM:
    """A model whose parameters have shapes but no memory, for `load_state` to fill."""
    with torch.device("meta"):
        model = MobileVLM(config, decoder_layers=decoder_layers)
    # Buffers that no checkpoint holds are made anew, with memory.
    model.llm.model.rotary_emb = LlamaRotaryEmbedding(model.llm.config)
    embeddings = model.tower.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions).expand((1, -1))
    return model


def load_state(
    model: MobileVLM,
    state: Mapping[str, Tensor],
    where: str,
    *,
    needed: Collection[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Put published tensors into an empty model; those it has no place for go to `passthrough`.

    Args:
        needed: published names to load, by default all that the model has.

    Raises:
        CheckpointError: a tensor that is needed is missing or has another shape.
    """
    expected = {to_published(name): tensor for name, tensor in model.state_dict().items()}
    needed = set(expected if needed is None else needed)
    missing = sorted(needed - set(state))
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} tensors are missing: {', '.join(missing[:3])}"
        )
    for name in sorted(needed):
        if state[name].shape != expected[name].shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(state[name].shape)}, "
                f"but the config asks for {list(expected[name].shape)}"
            )
    # A copy: what was read may be the file itself, mapped into memory.
    ours = {}
    with progress("load", "tensor", total=len(needed)) as bar:
        for name in needed:
            ours[to_ours(name)] = state[name].to(dtype, copy=True)
            bar.update()
    model.load_state_dict(ours, strict=False, assign=True)
    model.passthrough = {name: tensor for name, tensor in state.items() if name not in expected}


def read_tower(config: VLMConfig) -> dict[str, Tensor]:
    """The tower's weights from its own folder, under the names of a MobileVLM checkpoint.

    Raises:
        CheckpointError: the folder has no vision weights.
    """
    folder = ModelFolder(str(config.tower_folder))
    names = [name for name in folder.tensor_files() if name.startswith("vision_model.")]
    if not names:
        raise CheckpointError(f"{folder.name}: no tensors vision_model.*; expected a CLIP folder")
    prefix = _TOWER.removesuffix("vision_model.")
    return {prefix + name: tensor for name, tensor in folder.read(names).items()}


def to_ours(name: str) -> str:
    """Published tensor name -> name in this module."""
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return f"llm.{name}"


def to_published(name: str) -> str:
    """Name in this module -> published tensor name."""
    for theirs, ours in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name.removeprefix("llm.")


def _rope_as_published(llama: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama's config with its rotary embedding and number format as transformers 4 writes them:
    the original code reads no others, and would run with the base 10000.
    """
    published = dict(llama)
    if rope := published.pop("rope_parameters", None):
        rope = dict(rope)
        kind = rope.pop("rope_type", "default")
        published["rope_theta"] = rope.pop("rope_theta", 10000.0)
        published["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    if "dtype" in published:
        published["torch_dtype"] = published.pop("dtype")
    return published


@contextmanager
def _accepted(folder: ModelFolder) -> Iterator[None]:
    """Of a block that reads values of a config.json: what is wrong with one names the folder."""
    try:
        yield
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder.name}: config.json cannot be used ({why})") from error


def _check_llama(llama: LlamaConfig) -> None:
    _check_activation(llama.hidden_act)
    kind = llama.rope_parameters["rope_type"]
    if kind not in _ROPE_TYPES:
        # Others take their frequencies from the longest sequence of a batch: what is stored of a
        # sample would depend on those beside it.
        raise ValueError(f"rope_type {kind!r}, expected one of {', '.join(_ROPE_TYPES)}")
    if llama.tie_word_embeddings:
        raise ValueError(
            "tie_word_embeddings is true, but MobileVLM's layout has an lm_head of its own: save "
            "the model with it false and both tensors"
        )
    if type(llama.eos_token_id) is not int:
        raise ValueError(f"eos_token_id is {llama.eos_token_id!r}, expected one token")


def _check_activation(name: str) -> None:
    if name not in ACT2FN:
        raise ValueError(f"hidden_act {name!r} is not known")


def _check_selection(folder: ModelFolder, published: Mapping[str, Any], depth: int) -> None:
    feature = published.get("mm_vision_select_feature", "patch")
    if feature != "patch":
        raise CheckpointError(
            f"{folder.name}: mm_vision_select_feature {feature!r}, only 'patch' is supported"
        )
    layer = published.get("mm_vision_select_layer")
    if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
        raise CheckpointError(
            f"{folder.name}: mm_vision_select_layer is {layer!r}, but the tower has {depth} layers"
        )


def _open_tower(
    folder: ModelFolder, published: Mapping[str, Any], vision_tower: str | None
) -> ModelFolder:
    if vision_tower is not None:
        return ModelFolder(vision_tower)
    name = published.get("mm_vision_tower")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{folder.name}: config.json has no mm_vision_tower; name one with --vision-tower"
        )
    try:
        inside = folder.path / name
        return ModelFolder(str(inside) if is_folder(inside, CheckpointError) else name)
    except CheckpointError as error:
        raise CheckpointError(
            f"the vision tower that the config.json of {folder.name} names: {error}; a CLIP folder "
            "of this machine is given with --vision-tower"
        ) from error
