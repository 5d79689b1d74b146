"""Conversations -> token ids and labels, exactly as the original code does it.

Source: MobileVLM `train.py` (`preprocess_plain`, `preprocess_v1`, `tokenizer_image_token`). The
one deliberate difference: where the original masks a whole sample and prints a warning, or cuts it
at the length limit, this module refuses the sample with a reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from shared.conversation import IMAGE, Conversation, Turn
from shared.errors import UnusableSample
from shared.spec import Template
from shared.tokenizer import Tokenizer

IMAGE_TOKEN = -200
"Id that stands for all vision tokens of the image, before they are expanded."
IGNORE = -100
"Label of a position that is not learned."

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
USER, ASSISTANT = "USER: ", "ASSISTANT: "
END = "</s>"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One sample as the model sees it, with the image still one token."""

    input_ids: Int32[np.ndarray, " T"]
    "Token ids; the image is -200."
    labels: Int32[np.ndarray, " T"]
    "Ids to learn; -100 where ignored."
    vision_start: int | None
    "Position of the first vision token; None for text only."

    def num_tokens(self, num_vision: int) -> int:
        """Length in tokens once the image is expanded to `num_vision` tokens."""
        return len(self.input_ids) + (num_vision - 1 if self.vision_start is not None else 0)


def check_length(length: int, max_tokens: int) -> int:
    """`length`, of an expanded sequence in tokens.

    Raises:
        UnusableSample: it is over `max_tokens`. Nothing is cut: the end is what is to be learned.
    """
    if length > max_tokens:
        raise UnusableSample(f"{length} tokens, at most {max_tokens}")
    return length


def build_prompt(conversation: Conversation, template: Template, tokenizer: Tokenizer) -> Prompt:
    """Ids and labels of one conversation under a template.

    Raises:
        UnusableSample: the text does not fit the template or cannot be masked without doubt.
    """
    _refuse_special_tokens(conversation.turns, tokenizer)
    match template:
        case "plain":
            ids, labels = _plain(conversation, tokenizer)
        case "v1":
            ids, labels = _v1(conversation, tokenizer)
    if all(label == IGNORE for label in labels):
        raise UnusableSample("no token of an answer to learn")
    return Prompt(
        input_ids=np.array(ids, dtype=np.int32),
        labels=np.array(labels, dtype=np.int32),
        vision_start=ids.index(IMAGE_TOKEN) if conversation.has_image else None,
    )


def question_ids(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """Ids of a `v1` prompt that ends where the assistant is to answer the last human turn."""
    text = SYSTEM + _v1_rounds(turns) + "ASSISTANT:"
    return tokenize_with_image(text, tokenizer)


def tokenize_with_image(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of `text` with one BOS in front and -200 for `<image>`."""
    before, *after = (tokenizer(part).input_ids for part in text.split(IMAGE))
    ids = list(before)
    for part in after:
        ids += [IMAGE_TOKEN, *part[1:]]  # each part was given a BOS of its own
    return ids


def _plain(conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    turns = conversation.turns
    if len(turns) != 2 or not conversation.has_image:
        raise UnusableSample("template plain takes one image and one caption")
    ids = tokenize_with_image(IMAGE + turns[1].text + "\n", tokenizer)
    return ids, [IGNORE, IGNORE, *ids[2:]]  # BOS and the image


def _v1(conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    rounds = [
        _v1_rounds(conversation.turns[start : start + 2])
        for start in range(0, len(conversation.turns), 2)
    ]
    ids = tokenize_with_image(SYSTEM + "".join(rounds), tokenizer)
    labels = [IGNORE] * len(ids)
    position = 1  # after BOS
    for number, text in enumerate(rounds):
        text = text.removesuffix(END) if number else SYSTEM + text.removesuffix(END)
        question = text[: text.index(" " + ASSISTANT) + 1] + ASSISTANT
        # A part tokenised alone starts with BOS, which stands in for the END that was cut off.
        length = len(tokenize_with_image(text, tokenizer))
        # -2: its BOS, and the space after "ASSISTANT:" that belongs to the answer's first token.
        masked = len(tokenize_with_image(question, tokenizer)) - 2
        labels[position + masked : position + length] = ids[position + masked : position + length]
        position += length
    if position != len(ids):
        raise UnusableSample(f"label mask covers {position} of {len(ids)} tokens: odd text")
    return ids, labels


def _v1_rounds(turns: Sequence[Turn]) -> str:
    return "".join(
        f"{USER}{turn.text} " if turn.role == "human" else f"{ASSISTANT}{turn.text}{END}"
        for turn in turns
    )


def _refuse_special_tokens(turns: Sequence[Turn], tokenizer: Tokenizer) -> None:
    for turn in turns:
        for token in (*tokenizer.all_special_tokens, " " + ASSISTANT):
            if token in f" {turn.text} ":
                raise UnusableSample(f"text holds {token.strip()!r}, which belongs to the template")
