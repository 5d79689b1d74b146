"""One micro-batch of training: sequences, pixels and what the teacher said of them.

Axes: N sample with an image, Q text row, R response position, K cached top-k entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from shared.record import Skipped
from shared.sequence import SequenceBatch


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Teacher signals of one batch as they are stored: decoded where the student is.

    Stored arrays come by suffix, as `shared.tensor_encodings.decode` takes them. A signal that is
    not used is empty or None.
    """

    attention: dict[int, dict[str, Shaped[Tensor, "N Q teacher_head ..."]]]
    "Teacher layer -> A_tv of the samples with an image; padded rows decode to zero."
    vision_tokens: dict[str, Shaped[Tensor, "N ..."]]
    "Projected vision tokens of the samples with an image."
    top_ids: Shaped[Tensor, "R K"] | None
    "Likeliest tokens at the batch's response positions, sample by sample."
    top_logprobs: dict[str, Shaped[Tensor, "R ..."]]
    "Their log-probabilities in nats."
    rest_logprobs: Float[Tensor, " R"] | None
    "Log of the mass outside the top k; None if k is the vocabulary."


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """One micro-batch."""

    sequences: SequenceBatch
    "Ids, labels, vision spans."
    pixels: Float[Tensor, "N 3 S S"]
    "Images of the samples that have one, in batch order."
    targets: Targets | None
    "Teacher signals; None in plain supervised training."
    skipped: tuple[Skipped, ...]
    "Samples that were to be in the batch but have a broken image."

    @property
    def row_mask(self) -> Bool[Tensor, "N Q"]:
        """True for real text rows of the samples with an image."""
        rows = self.sequences.num_text_rows[self.sequences.with_image]
        longest = int(rows.max()) if len(rows) else 0
        return torch.arange(longest, device=rows.device) < rows[:, None]

    def to(self, device: torch.device) -> "TrainingBatch":
        """The same batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "TrainingBatch":
        """The same batch in memory that a GPU fetches while the CPU goes on; DataLoader asks."""
        return self._each(Tensor.pin_memory)

    def copied(self) -> "TrainingBatch":
        """The same batch in memory of this process."""
        return self._each(Tensor.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TrainingBatch":
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, Mapping):
                return {key: changed(item) for key, item in value.items()}
            if isinstance(value, SequenceBatch | Targets):
                return replace(
                    value, **{f.name: changed(getattr(value, f.name)) for f in fields(value)}
                )
            return value

        return replace(
            self,
            sequences=changed(self.sequences),
            pixels=change(self.pixels),
            targets=changed(self.targets),
        )
