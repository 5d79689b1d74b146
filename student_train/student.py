"""Student, attention capture and adapters as one module: what the optimiser, the wrappers for many
devices and the checkpoints see is everything that is trained.

Axes: B sample, N sample with an image, H head, Q text row, V vision token, C channel, R response
position.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.capture import QueryKey, catch_query_key, text_to_vision
from shared.errors import ConfigError
from shared.mobilevlm import MobileVLM
from shared.spec import CacheSpec
from shared.tensor_encodings import decode
from student_train.batch import Targets, TrainingBatch
from student_train.config import LossConfig
from student_train.losses import (
    attention_mse,
    cross_entropy,
    cross_entropy_and_topk_kl,
    focused_vision,
    vision_mse,
)

TERMS = ("sup", "kl", "attention", "vision_all", "vision_focus")
"Loss terms by the name they have in logs."


@dataclass(frozen=True, kw_only=True)
class TeacherShape:
    """What of the teacher the adapters have to fit."""

    heads: int
    "Attention heads."
    width: int
    "Channels of its vision tokens."

    @classmethod
    def of(cls, identity: Mapping[str, Any]) -> "TeacherShape":
        """From a cache's identity."""
        teacher = identity["teacher"]
        return cls(heads=int(teacher["attention_heads"]), width=int(teacher["hidden_size"]))


class Adapters(nn.Module):
    """Learned maps from the teacher's heads and channels to the student's.

    Trained with the student, saved with its checkpoints, carried from stage to stage, and left out
    of the exported student.
    """

    def __init__(
        self, teacher: TeacherShape, layers: tuple[int, ...], heads: int, width: int
    ) -> None:
        """`layers`: teacher layers whose attention is compared; `heads`, `width`: the student's."""
        super().__init__()
        self.attention = nn.ModuleDict(
            {str(layer): _map_of_heads(teacher.heads, heads) for layer in layers}
        )
        self.vision = nn.Linear(teacher.width, width)
        nn.init.zeros_(self.vision.bias)


class AlignedStudent(nn.Module):
    """A student that computes its own loss terms against a teacher's signals."""

    def __init__(
        self,
        model: MobileVLM,
        loss: LossConfig,
        *,
        teacher: TeacherShape | None = None,
        spec: CacheSpec | None = None,
        train_tower: bool = False,
    ) -> None:
        """Without `teacher` and `spec`: plain supervised training, no adapters.

        Raises:
            ConfigError: the loss weighs a signal that the spec does not store, or maps to a layer
                that the student does not have.
        """
        super().__init__()
        self.model = model
        self.loss = loss
        self.train_tower = train_tower
        self.model.tower.requires_grad_(train_tower)
        self.layer_map = layer_map_in_force(loss, spec, model) if spec is not None else {}
        self._encodings = spec.encodings if spec is not None else {}
        llama = model.llm.config
        self.adapters = (
            Adapters(teacher, tuple(self.layer_map), llama.num_attention_heads, model.width)
            if teacher is not None
            else None
        )
        if self.adapters is not None:
            self.adapters.vision.requires_grad_(loss.vision > 0)

    def counts(self, batch: TrainingBatch) -> Tensor:
        """What each of TERMS is a sum over, [5] float32: response positions or samples."""
        positions = int(batch.sequences.response_mask.sum())
        images = int(batch.sequences.with_image.sum())
        return torch.tensor([positions, positions, images, images, images], dtype=torch.float32)

    def weights(self) -> tuple[float, ...]:
        """Weight of each of TERMS; 0 for terms that are not computed."""
        if self.adapters is None:
            return (1.0, 0.0, 0.0, 0.0, 0.0)
        focus = self.loss.vision if self.loss.focus_tokens else 0.0
        return (1.0, self.loss.kl, self.loss.attention, self.loss.vision, focus)

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Loss terms, each summed over the batch's response positions or samples with an image."""
        sequences, targets = batch.sequences, batch.targets
        with torch.set_grad_enabled(self.train_tower and torch.is_grad_enabled()):
            patches = self.model.patch_features(batch.pixels) if len(batch.pixels) else None
        vision = (
            batch.pixels.new_zeros(0, 1, self.model.width)
            if patches is None
            else self.model.projector(patches)
        )
        embeds = self.model.embed(sequences.ids, sequences.vision_mask, vision)
        compared = tuple(self.layer_map.values()) if self.loss.attention else ()
        with catch_query_key(self.model.llm.model.layers, compared) as caught:
            out = self.model.llm.model(inputs_embeds=embeds, use_cache=False)
        mask = sequences.response_mask
        logits = self.model.llm.lm_head(out.last_hidden_state[mask])
        labels = sequences.labels.roll(-1, 1)[mask]
        # Losses in float32 whatever the forward pass ran in.
        with torch.autocast(embeds.device.type, enabled=False):
            terms = self._vocabulary_terms(targets, logits, labels)
            if targets is not None:
                terms |= self._alignment_terms(batch, targets, vision, caught)
        return terms

    def _vocabulary_terms(
        self, targets: Targets | None, logits: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        if targets is None or targets.top_ids is None:
            return {"sup": cross_entropy(logits, labels).sum()}
        top_logprobs = decode(self._encodings["logprobs"], targets.top_logprobs)
        sup, kl = cross_entropy_and_topk_kl(
            logits, labels, targets.top_ids.long(), top_logprobs, targets.rest_logprobs,
            self.loss.kl_direction,
        )  # fmt: skip
        return {"sup": sup.sum(), "kl": kl.sum()}

    def _alignment_terms(
        self,
        batch: TrainingBatch,
        targets: Targets,
        vision: Tensor,
        caught: Mapping[int, QueryKey],
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        attention = {
            layer: decode(self._encodings["attention"], parts).transpose(1, 2)
            for layer, parts in targets.attention.items()
        }
        if attention and self.loss.attention:
            terms["attention"] = self._attention_term(batch, attention, caught)
        if targets.vision_tokens:
            teacher = decode(self._encodings["vision_tokens"], targets.vision_tokens)
            terms |= self._vision_terms(batch, attention, teacher, vision)
        return terms

    def _attention_term(
        self, batch: TrainingBatch, teacher: Mapping[int, Tensor], caught: Mapping[int, QueryKey]
    ) -> Tensor:
        """Mean over the named layers, summed over samples."""
        assert self.adapters is not None
        sequences, row_mask = batch.sequences, batch.row_mask
        keep = sequences.with_image
        start, lengths = sequences.vision_start[keep], sequences.lengths[keep]
        errors = []
        for teacher_layer, student_layer in self.layer_map.items():
            student = text_to_vision(
                caught[student_layer].only(keep), start, lengths, row_mask.shape[1]
            )
            adapted = self.adapters.attention[str(teacher_layer)](teacher[teacher_layer])
            errors.append(attention_mse(student, adapted, row_mask).sum())
        return torch.stack(errors).mean()

    def _vision_terms(
        self,
        batch: TrainingBatch,
        attention: Mapping[int, Tensor],
        teacher: Tensor,
        vision: Tensor,
    ) -> dict[str, Tensor]:
        assert self.adapters is not None
        error_NV = vision_mse(vision, self.adapters.vision(teacher))
        terms = {"vision_all": error_NV.mean(dim=1).sum()}
        if self.loss.focus_tokens:
            shallowest = attention[min(attention)]
            focus = focused_vision(shallowest, batch.row_mask, self.loss.focus_tokens)
            terms["vision_focus"] = error_NV.gather(1, focus).mean(dim=1).sum()
        return terms


def layer_map_in_force(loss: LossConfig, spec: CacheSpec, model: MobileVLM) -> dict[int, int]:
    """Teacher layer -> student layer whose attention is compared; empty if none is.

    Raises:
        ConfigError: the loss asks for what the cache or the student does not have.
    """
    stored = {
        "kl": spec.logprobs, "attention": spec.attention, "vision": spec.vision_tokens
    }  # fmt: skip
    for name, signal in stored.items():
        if getattr(loss, name) and signal is None:
            raise ConfigError(
                f"the recipe weighs loss.{name} with {getattr(loss, name)}, but the cache stores "
                f"no such signal; --set loss.{name}=0, or build a cache whose spec has it"
            )
    if loss.vision and loss.focus_tokens and spec.attention is None:
        raise ConfigError(
            "loss.focus_tokens needs attention, which the cache does not store; "
            "--set loss.focus_tokens=0"
        )
    if not loss.attention:
        return {}
    layer_map = loss.layer_map or {layer: layer for layer in spec.attention_layers}
    depth = int(model.llm.config.num_hidden_layers)
    for teacher_layer, student_layer in layer_map.items():
        if teacher_layer not in spec.attention_layers:
            raise ConfigError(
                f"loss.layer_map names teacher layer {teacher_layer}, but the cache stores layers "
                f"{list(spec.attention_layers)}"
            )
        if not 0 <= student_layer < depth:
            raise ConfigError(
                f"attention of teacher layer {teacher_layer} is to teach student layer "
                f"{student_layer}, but the student has layers 0 to {depth - 1}; set loss.layer_map"
            )
    return layer_map


def _map_of_heads(teacher_heads: int, heads: int) -> nn.Conv2d:
    adapter = nn.Conv2d(teacher_heads, heads, kernel_size=1)
    # Near the mean over heads. Torch's default bias (up to 1/sqrt(heads)) is far larger than
    # any attention weight and would drown the signal at first.
    nn.init.normal_(adapter.weight, mean=1 / teacher_heads, std=0.1 / teacher_heads)
    assert adapter.bias is not None
    nn.init.zeros_(adapter.bias)
    return adapter
