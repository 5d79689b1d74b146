"""LLaVA-format annotations: what a conversation is, and what is wrong with a bad one.

`{"id": ..., "image": "a.png" (optional), "conversations": [{"from": "human", "value": ...}, ...]}`
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shared.errors import UnusableSample
from shared.strict import shown

IMAGE = "<image>"
"Where the image goes, in the text of a human turn."


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message."""

    role: Literal["human", "gpt"]
    "Who speaks."
    text: str
    "What is said; one human turn of a sample with an image starts with `<image>`."


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Checked turns: human and gpt take turns, human first, gpt last, no empty answer."""

    turns: tuple[Turn, ...]
    "In order."
    has_image: bool
    "Whether one turn holds `<image>`."


def parse_annotation(annotation: object, *, has_image: bool) -> Conversation:
    """The conversation of one annotation, with `<image>` moved to the front of its turn.

    As MobileVLM's `preprocess_multimodal` and `preprocess_v1` do it: text around `<image>` is
    stripped, and a first message that is not from a human is left out.

    Args:
        annotation: the parsed JSON.
        has_image: whether an image comes with it.

    Raises:
        UnusableSample: with the reason.
    """
    if not isinstance(annotation, dict):
        raise UnusableSample(f"JSON is not an object but {type(annotation).__name__}")
    messages = annotation.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise UnusableSample("no conversations")
    if isinstance(annotation.get("image"), list):
        raise UnusableSample("more than one image")
    if annotation.get("image") and not has_image:
        raise UnusableSample(f"image {shown(annotation['image'])} is not in the tar")
    turns = [_turn(message) for message in messages]
    if turns[0].role == "gpt":
        turns = turns[1:]
    _check_roles(turns)
    return Conversation(turns=tuple(_place_image(turns, has_image)), has_image=has_image)


def _turn(message: object) -> Turn:
    if not isinstance(message, dict):
        raise UnusableSample("a message is not an object")
    role, text = message.get("from"), message.get("value")
    if role not in ("human", "gpt"):
        raise UnusableSample(f"odd role {shown(role)}, expected 'human' or 'gpt'")
    if not isinstance(text, str):
        raise UnusableSample("a message without text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UnusableSample("text holds half of a character (a lone surrogate)")
    if role == "gpt" and not text.strip():
        raise UnusableSample("empty answer")
    return Turn(role=role, text=text)


def _check_roles(turns: Sequence[Turn]) -> None:
    if not turns:
        raise UnusableSample("no question")
    for number, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[number % 2]:
            raise UnusableSample(f"odd roles: message {number} is from {turn.role!r} again")
    if turns[-1].role != "gpt":
        raise UnusableSample("no answer to the last question")


def _place_image(turns: Sequence[Turn], has_image: bool) -> list[Turn]:
    found = [turn.text.count(IMAGE) for turn in turns]
    if sum(found) > 1:
        raise UnusableSample(f"{sum(found)} {IMAGE} marks, at most one is possible")
    if has_image and not sum(found):
        raise UnusableSample(f"an image but no {IMAGE} in the text")
    if sum(found) and not has_image:
        raise UnusableSample(f"{IMAGE} in the text but no image")
    if any(count and turn.role == "gpt" for count, turn in zip(found, turns, strict=True)):
        raise UnusableSample(f"{IMAGE} in an answer")
    return [_image_first(turn) if count else turn for count, turn in zip(found, turns, strict=True)]


def _image_first(turn: Turn) -> Turn:
    text = turn.text.replace(IMAGE, "").strip()
    return Turn(role=turn.role, text=f"{IMAGE}\n{text}".strip())
