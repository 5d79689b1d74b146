"""The recipe of a training run: everything that decides its outcome, and how it is watched.

A recipe is a YAML file, strict as a spec; `--set a.b=c` changes one value of it.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import yaml

from shared.errors import ConfigError
from shared.spec import Aspect, Template
from shared.strict import find_yaml, parse, read_yaml, yaml_value

_AT_LEAST_ONE = (
    "epochs", "max_steps", "global_batch", "micro_batch", "log_every", "save_every",
    "keep_checkpoints", "eval_every", "eval_samples", "max_new_tokens",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss `sup + kl L_rkl + attention L_attn + vision (L_v_all + L_v_focus)`.

    They count only with `--cache`; a weight of 0 leaves the signal unread (attention is read for
    L_v_focus too).
    """

    kl: float = 1.0
    "Weight of the KL between student and teacher at response positions."
    attention: float = 1.0
    "Weight of the text-to-vision attention error."
    vision: float = 1.0
    "Weight of the two vision token errors."
    kl_direction: Literal["reverse", "forward"] = "reverse"
    "`reverse`: KL(student || teacher), the paper's; `forward`: KL(teacher || student)."
    focus_tokens: int = 16
    "Vision tokens in L_v_focus; 0 leaves that term out."
    layer_map: dict[int, int] | None = None
    "Teacher layer -> student layer that it teaches; by default each teaches its namesake."

    def __post_init__(self) -> None:
        for name in ("kl", "attention", "vision"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, found {getattr(self, name)}")
        if not 0 <= self.focus_tokens <= 144:
            raise ValueError(f"focus_tokens must be 0 to 144, found {self.focus_tokens}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to zero."""

    lr: float
    "Peak learning rate of the language model (and of the tower if it is trained)."
    projector_lr: float | None = None
    "Peak learning rate of the projector; by default `lr`."
    adapter_lr: float = 1e-3
    "Peak learning rate of the adapters, which start from scratch."
    weight_decay: float = 0.0
    "Decoupled weight decay."
    warmup: float = 0.03
    "Share of the steps in which the rate rises."
    clip_norm: float = 1.0
    "Gradients are scaled down to this norm."

    def __post_init__(self) -> None:
        for name in ("lr", "projector_lr", "adapter_lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, found {value}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be 0 to 1, found {self.warmup}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be >= 0 and finite, found {self.weight_decay}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run."""

    template: Template
    "Prompt template, `plain` (stage I) or `v1` (stage II); with a cache it must be the cache's."
    image_aspect: Aspect
    "How images are made square, `pad` or `square` (crop); with a cache it must be the cache's."
    max_tokens: int = 2048
    "Longest sequence, vision tokens counted; longer samples are skipped and listed."
    epochs: int = 1
    "Passes over the data."
    max_steps: int | None = None
    "Stop after so many steps, if that is before the epochs are over; the schedule ends there too."
    global_batch: int
    "Samples per optimiser step, over all processes."
    micro_batch: int
    "Samples per forward pass and process; changes memory and speed, not the result."
    group_by_length: bool = False
    "Put samples of similar length into one batch."
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    "`float32`, `bfloat16` or `float16`, of forward and backward pass; weights stay in float32."
    gradient_checkpointing: bool = False
    "Recompute activations in the backward pass: less memory, about a third more time."
    train_tower: bool = False
    "Train the vision tower too. MobileVLM V2 never does; the demo's teacher is made with it."
    seed: int = 0
    "Of a fresh projector, the adapters and the order of the data."
    optim: OptimConfig
    "Optimiser and schedule."
    loss: LossConfig = field(default_factory=LossConfig)
    "Loss weights."
    log_every: int = 10
    "Steps between log lines."
    save_every: int = 500
    "Steps between checkpoints."
    keep_checkpoints: int = 2
    "Checkpoints kept; older ones are deleted."
    eval_every: int | None = None
    "Steps between evaluations on --eval-data; by default only at the end."
    eval_samples: int | None = None
    "Held-out samples per evaluation, evenly spread over the tars; by default all."
    max_new_tokens: int = 32
    "Longest greedy answer in evaluation, in tokens."
    workers: int = 2
    "Processes that read and decode data."
    export_weights: Literal["bin", "safetensors"] = "bin"
    "`bin`, which the original code and llama.cpp read, or `safetensors`."

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, found {self.seed}")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, found {getattr(self, name)}")
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch} does not divide global_batch {self.global_batch}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as runs and exports hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]


MAY_CHANGE = frozenset(
    ("log_every", "save_every", "keep_checkpoints", "eval_every", "eval_samples", "max_new_tokens",
     "workers", "micro_batch", "export_weights")
)  # fmt: skip
"Recipe fields that do not change the trained weights, and so may change when a run is resumed."


def load_recipe(name: str, settings: Sequence[str]) -> Recipe:
    """A recipe by file, or by the name of one that ships (`stage1`, `stage2`).

    Args:
        settings: `a.b=c` changes, values in YAML.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest is named) or nonsense value.
    """
    path = find_yaml(name, resources.files("student_train") / "recipes", "recipe")
    values = read_yaml(path)
    for setting in settings:
        _apply(values, setting)
    return parse(Recipe, values, where=" ".join([str(path), *(f"--set {s}" for s in settings)]))


def _apply(values: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set {setting}: expected key=value, as in optim.lr=1e-4")
    *parents, last = path.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {setting}: {parent} is not a group of keys")
        values = child
    try:
        values[last] = yaml_value(text)
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"--set {setting}: value is not YAML: {why}") from error
