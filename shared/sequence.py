"""From token ids with one image token to the sequence that the decoder sees, padded in batches.

`text before | V vision tokens | text after`, padded on the right. Attention is causal, so a real
position never sees padding and no padding mask is needed.

Axes: B sample, T token, V vision token, C channel, Q text row (position after the image).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from shared.mobilevlm import NUM_VISION
from shared.prompt import IGNORE, IMAGE_TOKEN


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Expanded sequences. Image samples may be mixed with text-only ones."""

    ids: Int[Tensor, "B T"]
    "Token ids; 0 at vision positions and padding."
    labels: Int[Tensor, "B T"]
    "Ids to learn; -100 at vision positions, padding and what is ignored."
    lengths: Int[Tensor, " B"]
    "Tokens of each sample, vision tokens counted."
    vision_start: Int[Tensor, " B"]
    "First vision position; -1 for text only."

    @property
    def vision_mask(self) -> Bool[Tensor, "B T"]:
        """True at vision positions."""
        position = torch.arange(self.ids.shape[1], device=self.ids.device)
        start = self.vision_start[:, None]
        return (start >= 0) & (position >= start) & (position < start + NUM_VISION)

    @property
    def response_mask(self) -> Bool[Tensor, "B T"]:
        """True where the *next* token carries a label."""
        learned = self.labels[:, 1:] != IGNORE
        return nn.functional.pad(learned, (0, 1), value=False)

    @property
    def with_image(self) -> Bool[Tensor, " B"]:
        """True for samples with an image."""
        return self.vision_start >= 0

    @property
    def num_text_rows(self) -> Int[Tensor, " B"]:
        """Text positions after the image, Q of each sample; 0 for text only."""
        return torch.where(self.with_image, self.lengths - self.vision_start - NUM_VISION, 0)

    @property
    def first_text_row(self) -> int:
        """The first text position after an image, of all samples; 0 if there is no image."""
        starts = self.vision_start[self.with_image]
        return int(starts.min()) + NUM_VISION if len(starts) else 0

    def to(self, device: torch.device) -> "SequenceBatch":
        """The same batch on a device."""
        return SequenceBatch(
            ids=self.ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            vision_start=self.vision_start.to(device, non_blocking=True),
        )


def pad_sequences(
    input_ids: Sequence[Int[np.ndarray, " _"]], labels: Sequence[Int[np.ndarray, " _"]]
) -> SequenceBatch:
    """Expand and pad samples whose image is still the one token -200."""
    expanded = [_expand(ids, lab) for ids, lab in zip(input_ids, labels, strict=True)]
    all_ids = [torch.from_numpy(ids) for ids, _, _ in expanded]
    all_labels = [torch.from_numpy(lab) for _, lab, _ in expanded]
    return SequenceBatch(
        ids=pad_sequence(all_ids, batch_first=True),
        labels=pad_sequence(all_labels, batch_first=True, padding_value=IGNORE),
        lengths=torch.tensor([len(ids) for ids in all_ids]),
        vision_start=torch.tensor([start for _, _, start in expanded]),
    )


def splice(
    embedding: nn.Module, ids: Sequence[int], vision: Float[Tensor, "V C"] | None
) -> Float[Tensor, "T C"]:
    """Embeddings of one prompt with its vision tokens in place of -200."""
    weight = next(embedding.parameters())
    text = torch.tensor([max(token, 0) for token in ids], device=weight.device)
    embedded: Tensor = embedding(text)
    if vision is None:
        return embedded
    start = list(ids).index(IMAGE_TOKEN)
    return torch.cat([embedded[:start], vision.to(embedded), embedded[start + 1 :]])


def _expand(
    ids: Int[np.ndarray, " _"], labels: Int[np.ndarray, " _"]
) -> tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"], int]:
    found = np.flatnonzero(ids == IMAGE_TOKEN)
    if not len(found):
        return ids.astype(np.int64), labels.astype(np.int64), -1
    start = int(found[0])
    hole = np.zeros(NUM_VISION, dtype=np.int64)
    return (
        np.concatenate([ids[:start], hole, ids[start + 1 :]]),
        np.concatenate([labels[:start], hole + IGNORE, labels[start + 1 :]]),
        start,
    )
