"""Prompts: what is learned is the answers and nothing else, whatever the text."""

import logging

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from shared.conversation import Conversation, Turn, parse_annotation
from shared.errors import CheckpointError, UnusableSample
from shared.prompt import (
    ASSISTANT,
    END,
    IGNORE,
    IMAGE_TOKEN,
    SYSTEM,
    USER,
    Prompt,
    build_prompt,
    question_ids,
)
from shared.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, tokenizer_identity
from tests.support import TEACHER, annotation

WORDS = st.sampled_from(
    ["boat", "what", "color", "is", "red", "a", ".", "?", ",", "12", "\n", " ", "USER:", "é", "中",
     "😀", "<", ">", "image", "s", "/", "-", "'", "</", "Assistant:", ":"]
)  # fmt: skip
TEXT = st.lists(WORDS, min_size=1, max_size=12).map(" ".join) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=30
)
ROUNDS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


def prompt_of(
    tokenizer: Tokenizer, rounds: list[tuple[str, str]], *, image: bool, template: str = "v1"
) -> Prompt:
    first, *rest = rounds
    question = f"<image>\n{first[0]}" if image else first[0]
    texts = [question, first[1], *(text for pair in rest for text in pair)]
    conversation = parse_annotation(annotation(*texts), has_image=image)
    return build_prompt(conversation, template, tokenizer)  # type: ignore[arg-type]


def fits_template(rounds: list[tuple[str, str]]) -> bool:
    """What `build_prompt` must take: it may not refuse more than this to be on the safe side."""
    texts = [f" {text} " for pair in rounds for text in pair]
    marks = ("<s>", "</s>", "<unk>", "<image>", f" {ASSISTANT}")
    return all(answer.strip() for _, answer in rounds) and not any(
        mark in text for mark in marks for text in texts
    )


def runs_of_labels(prompt: Prompt) -> list[list[int]]:
    """The labels that are kept, cut where something ignored lies between."""
    runs: list[list[int]] = [[]]
    for label in prompt.labels.tolist():
        if label == IGNORE:
            runs.append([])
        else:
            runs[-1].append(label)
    return [run for run in runs if run]


@given(ROUNDS, st.booleans())
@example([("what", "red"), ("why", "so")], True)
@example([("", "red")], True)
@example([("what ", " red ")], False)
@example([("what\n", "\nred\n")], True)
@example([("what  is", "a  boat  ")], False)
def test_v1_learns_the_answers_and_their_end_and_nothing_else(
    tokenizer: Tokenizer, rounds: list[tuple[str, str]], image: bool
) -> None:
    assume(fits_template(rounds))

    prompt = prompt_of(tokenizer, rounds, image=image)

    runs = runs_of_labels(prompt)

    assert len(runs) == len(rounds)
    for run, (_, answer) in zip(runs, rounds, strict=True):
        learned = tokenizer.decode(run, skip_special_tokens=False)
        # The tokenizer's own round trip is the measure: some characters are not in its vocabulary.
        alone = tokenizer(f"{ASSISTANT}{answer}{END}").input_ids
        expected = tokenizer.decode(alone, skip_special_tokens=False)
        assert expected.endswith(learned.strip())
        assert learned.endswith(END)
        assert learned.removesuffix(END).split() == decoded_words(tokenizer, answer)


def decoded_words(tokenizer: Tokenizer, text: str) -> list[str]:
    ids = tokenizer(f"{ASSISTANT}{text}").input_ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    return decoded[decoded.index(ASSISTANT.strip()) + len(ASSISTANT.strip()) :].split()


@given(ROUNDS, st.booleans())
def test_labels_are_the_ids_where_they_are_kept_and_the_image_is_never_learned(
    tokenizer: Tokenizer, rounds: list[tuple[str, str]], image: bool
) -> None:
    assume(fits_template(rounds))

    prompt = prompt_of(tokenizer, rounds, image=image)

    kept = prompt.labels != IGNORE

    np.testing.assert_array_equal(prompt.labels[kept], prompt.input_ids[kept])
    assert not (kept & (prompt.input_ids == IMAGE_TOKEN)).any()
    assert (prompt.input_ids == IMAGE_TOKEN).sum() == image
    assert prompt.input_ids[0] == tokenizer.bos_token_id
    assert (prompt.input_ids[1:] != tokenizer.bos_token_id).all()
    assert prompt.input_ids[-1] == tokenizer.eos_token_id


@given(ROUNDS)
def test_what_is_ignored_is_the_whole_question(
    tokenizer: Tokenizer, rounds: list[tuple[str, str]]
) -> None:
    assume(fits_template(rounds))

    prompt = prompt_of(tokenizer, rounds, image=False)

    for number in range(len(rounds)):
        turns = [
            Turn(role=role, text=text)
            for question, answer in rounds[: number + 1]
            for role, text in (("human", question), ("gpt", answer))
        ][:-1]
        asked = question_ids(turns, tokenizer)
        # What `generate` is given is what stands, ignored at its end, in front of each answer.
        assert prompt.input_ids[: len(asked)].tolist() == asked
        assert (prompt.labels[len(asked) - 1 : len(asked)] == IGNORE).all()
        assert prompt.labels[len(asked)] != IGNORE


@given(TEXT)
def test_plain_learns_the_caption_and_a_line_break(tokenizer: Tokenizer, caption: str) -> None:
    assume(fits_template([("what", caption)]))

    prompt = prompt_of(tokenizer, [("what", caption)], image=True, template="plain")

    assert prompt.input_ids[:2].tolist() == [tokenizer.bos_token_id, IMAGE_TOKEN]
    assert prompt.labels[:2].tolist() == [IGNORE, IGNORE]
    np.testing.assert_array_equal(prompt.labels[2:], prompt.input_ids[2:])
    assert prompt.input_ids[2:].tolist() == tokenizer(f"{caption}\n").input_ids[1:]


def test_v1_is_the_originals_text(tokenizer: Tokenizer) -> None:
    prompt = prompt_of(tokenizer, [("what", "red"), ("why", "so")], image=False)

    text = f"{SYSTEM}{USER}what {ASSISTANT}red{END}{USER}why {ASSISTANT}so{END}"
    assert prompt.input_ids.tolist() == tokenizer(text).input_ids


@pytest.mark.parametrize("where", ["question", "answer"])
@pytest.mark.parametrize("token", ["<s>", "</s>", "<unk>", "ASSISTANT: "])
def test_tokens_of_the_template_are_refused_in_text(
    tokenizer: Tokenizer, where: str, token: str
) -> None:
    rounds = [(f"what {token}", "red")] if where == "question" else [("what", f"{token}red")]

    with pytest.raises(UnusableSample, match="belongs to the template"):
        prompt_of(tokenizer, rounds, image=False)


def test_the_image_moves_to_the_front_of_its_turn() -> None:
    note = annotation("what is <image> there", "red", "why", "so")

    found = parse_annotation(note, has_image=True)

    assert found.turns[0].text == "<image>\nwhat is  there"


def test_the_image_may_be_in_a_later_turn(tokenizer: Tokenizer) -> None:
    note = annotation("hello", "yes", "what is it\n<image>", "red")
    conversation = parse_annotation(note, has_image=True)

    prompt = build_prompt(conversation, "v1", tokenizer)

    assert prompt.vision_start == prompt.input_ids.tolist().index(IMAGE_TOKEN)
    assert len(runs_of_labels(prompt)) == 2
    assert prompt.num_tokens(144) == len(prompt.input_ids) + 143


def test_plain_takes_no_text_only_sample(tokenizer: Tokenizer) -> None:
    turns = (Turn(role="human", text="a"), Turn(role="gpt", text="b"))

    with pytest.raises(UnusableSample, match="one image and one caption"):
        build_prompt(Conversation(turns=turns, has_image=False), "plain", tokenizer)


def test_a_long_text_is_no_reason_for_a_warning() -> None:
    """The length limit is the spec's; transformers' own would only confuse."""
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)

    ids = load_tokenizer(TEACHER)("boat " * 4000).input_ids

    logging.getLogger("transformers").removeHandler(handler)
    assert len(ids) > 2048
    assert not heard


def test_a_vocabulary_must_hold_every_id_that_text_can_give(
    tokenizer: Tokenizer,
) -> None:
    largest = max(tokenizer.get_vocab().values())

    check_vocabulary(tokenizer, largest + 1, "here")
    with pytest.raises(CheckpointError, match=rf"here: .*gives id {largest} "):
        check_vocabulary(tokenizer, largest, "here")


@pytest.mark.parametrize(
    ("template", "question", "answer", "ids"),
    [
        ("v1", "<image>", "red boat", [476, 462, 504, 370, 323, 2]),
        ("plain", "<image>", " red boat", [476, 370, 323, 13]),
    ],
)
def test_a_text_that_begins_with_a_space_has_a_token_of_its_own_for_it(
    tokenizer: Tokenizer, template: str, question: str, answer: str, ids: list[int]
) -> None:
    """As of MobileVLM's tokenizer (transformers 4.33.1, slow): one space always goes before."""
    conversation = parse_annotation(annotation(question, answer), has_image=True)

    prompt = build_prompt(conversation, template, tokenizer)  # type: ignore[arg-type]

    assert prompt.input_ids[-len(ids) - 1 :].tolist() == [IMAGE_TOKEN, *ids]


def test_the_tokenizers_identity_holds_its_behaviour(tokenizer: Tokenizer) -> None:
    other = load_tokenizer(TEACHER)
    other.backend_tokenizer.normalizer = None

    identity, changed = tokenizer_identity(tokenizer), tokenizer_identity(other)

    assert [name for name in identity if identity[name] != changed[name]] == ["behaviour_sha256"]
