"""Held-out evaluation: supervised loss, and exact match of greedy answers.

Every question of a conversation is asked with the true conversation before it; an answer counts if
its text is exactly the true one, spaces around it aside.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shared.conversation import Conversation
from shared.errors import TrainingError, UnusableSample
from shared.images import ImageProcessor, decode_image
from shared.mobilevlm import NUM_VISION, MobileVLM
from shared.progress import progress
from shared.prompt import IGNORE, Prompt, build_prompt, check_length, question_ids
from shared.samples import Sample, SampleEntry, TarIndex, index_tars, read_sample, spread
from shared.sequence import pad_sequences
from shared.spec import Template
from shared.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_BATCH = 64
"Samples that are read at a time."
_MOST_TOKENS = 2**14
"""Tokens of one forward pass, padding counted. Of a 1.7B student each takes some 200 kB of keys and
values in bfloat16, and 128 kB of logits in float32 where a label stands."""


@dataclass(frozen=True, kw_only=True)
class HeldOutSample:
    """One sample, ready to be scored."""

    key: str
    "WebDataset key."
    conversation: Conversation
    "Questions and true answers."
    prompt: Prompt
    "Ids and labels."
    pixels: Tensor | None
    "[3, S, S] of its image."


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Sums, so that processes can add theirs up."""

    nats: float = 0.0
    "Summed cross entropy at response positions."
    positions: int = 0
    "Response positions."
    right: int = 0
    "Answers that match."
    answers: int = 0
    "Answers asked for; 0 for template plain, which asks nothing."
    skipped: int = 0
    "Samples that cannot be used."

    @property
    def loss(self) -> float:
        """Mean cross entropy in nats per response position."""
        return self.nats / max(1, self.positions)

    @property
    def exact_match(self) -> float | None:
        """Share of answers that match, 0..1; None if none were asked for."""
        return self.right / self.answers if self.answers else None

    def __add__(self, other: "Scores") -> "Scores":
        return Scores(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})


class HeldOutSet:
    """Held-out samples of some tars, read again at every evaluation so that memory stays small."""

    def __init__(
        self,
        tars: Sequence[Path],
        *,
        template: Template,
        max_tokens: int,
        tokenizer: Tokenizer,
        processor: ImageProcessor,
        limit: int | None,
        max_new_tokens: int,
    ) -> None:
        """Index the tars.

        Args:
            limit: samples that are scored, evenly spread over the tars; None for all.

        Raises:
            InputError: a tar cannot be read.
            TrainingError: the tars hold no sample.
        """
        indexes = index_tars(tars)
        entries = [(index, entry) for index in indexes for entry in index.samples]
        if not entries:
            raise TrainingError(f"no sample in {len(tars)} held-out tars")
        self._entries = spread(entries, limit or len(entries))
        self._unread = sum(len(index.skipped) for index in indexes)
        self._template, self._max_tokens = template, max_tokens
        self._tokenizer, self._processor = tokenizer, processor
        self._max_new_tokens = max_new_tokens

    def __len__(self) -> int:
        return len(self._entries)

    @torch.inference_mode()
    def score(self, model: MobileVLM, *, rank: int = 0, world: int = 1) -> Scores:
        """Scores of this process's share of the samples."""
        training = model.training
        model.eval()
        total = Scores(skipped=0 if rank else self._unread)
        mine = self._entries[rank::world]
        with progress("evaluate", "sample", total=len(mine)) as bar:
            for start in range(0, len(mine), _BATCH):
                entries = mine[start : start + _BATCH]
                samples = self._read(entries)
                total += Scores(skipped=len(entries) - len(samples))
                if samples:
                    total += self._score_batch(model, samples)
                bar.update(len(entries))
        model.train(training)
        return total

    def prepare(self, sample: Sample) -> HeldOutSample:
        """Prompt and pixels of one sample.

        Raises:
            UnusableSample: with the reason.
        """
        prompt = build_prompt(sample.conversation, self._template, self._tokenizer)
        check_length(prompt.num_tokens(NUM_VISION), self._max_tokens)
        pixels = None
        if sample.image is not None:
            pixels = torch.from_numpy(self._processor(decode_image(sample.image)))
        return HeldOutSample(
            key=sample.key, conversation=sample.conversation, prompt=prompt, pixels=pixels
        )

    def answers(self, model: MobileVLM, samples: Sequence[HeldOutSample]) -> list[list[str]]:
        """Greedy answers to every question of each sample."""
        vision = encode(model, samples)
        asked = [
            (number, question_ids(sample.conversation.turns[: turn + 1], self._tokenizer))
            for number, sample in enumerate(samples)
            for turn in range(0, len(sample.conversation.turns), 2)
        ]
        sizes = [
            len(ids) + self._max_new_tokens + (0 if vision[number] is None else NUM_VISION)
            for number, ids in asked
        ]
        texts: list[list[str]] = [[] for _ in samples]
        for some in passes(sizes, _MOST_TOKENS):
            found = model.generate(
                [ids for _, ids in asked[some]],
                [vision[number] for number, _ in asked[some]],
                max_new_tokens=self._max_new_tokens,
            )
            for (number, _), ids in zip(asked[some], found, strict=True):
                texts[number].append(self._tokenizer.decode(ids, skip_special_tokens=True).strip())
        return texts

    def _read(self, entries: Sequence[tuple[TarIndex, SampleEntry]]) -> list[HeldOutSample]:
        samples = []
        for index, entry in entries:
            try:
                samples.append(self.prepare(read_sample(index.path, entry)))
            except UnusableSample as reason:
                log.warning("held out skipped=%s reason=%s", entry.key, reason)
        return samples

    def _score_batch(self, model: MobileVLM, samples: Sequence[HeldOutSample]) -> Scores:
        nats, positions, right, answers = 0.0, 0, 0, 0
        for some in passes([s.prompt.num_tokens(NUM_VISION) for s in samples], _MOST_TOKENS):
            more, labels = supervised_loss(model, samples[some])
            nats, positions = nats + more, positions + labels
        if self._template == "v1":
            for sample, given in zip(samples, self.answers(model, samples), strict=True):
                true = [turn.text.strip() for turn in sample.conversation.turns[1::2]]
                right += sum(one == other for one, other in zip(given, true, strict=True))
                answers += len(true)
        return Scores(nats=nats, positions=positions, right=right, answers=answers)


def passes(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Consecutive items that go through a model together, each padded to the longest of them.

    Args:
        sizes: tokens of each item.
        most: tokens of one pass, padding counted; an item that has more goes alone.
    """
    start = 0
    longest = 0
    for number, size in enumerate(sizes):
        longest = max(longest, size)
        if number > start and (number + 1 - start) * longest > most:
            yield slice(start, number)
            start, longest = number, size
    if start < len(sizes):
        yield slice(start, len(sizes))


def supervised_loss(model: MobileVLM, samples: Sequence[HeldOutSample]) -> tuple[float, int]:
    """(summed cross entropy in nats, response positions)."""
    device = next(model.parameters()).device
    batch = pad_sequences(
        [s.prompt.input_ids for s in samples], [s.prompt.labels for s in samples]
    ).to(device)
    vision = [tokens for tokens in encode(model, samples) if tokens is not None]
    stacked = torch.stack(vision) if vision else torch.zeros(0, 1, model.width, device=device)
    embeds = model.embed(batch.ids, batch.vision_mask, stacked)
    hidden = model.llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    labels = batch.labels.roll(-1, 1)[batch.response_mask]
    assert not bool((labels == IGNORE).any())
    logits = model.llm.lm_head(hidden[batch.response_mask]).float()
    nats = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return float(nats), len(labels)


def encode(model: MobileVLM, samples: Sequence[HeldOutSample]) -> list[Tensor | None]:
    """Vision tokens of each sample, None for text only."""
    device = next(model.parameters()).device
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    encoded = iter(model.encode_images(torch.stack(pixels).to(device)) if pixels else ())
    return [None if sample.pixels is None else next(encoded) for sample in samples]
