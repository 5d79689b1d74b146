"""The `easy-vqa` data set as LLaVA-format JSON and as tars: train, validation and test.

Every question is a conversation of its own. Validation is a fixed share of the training *images*;
test is the data set's own.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import easy_vqa

from cache_builder.pack import PackReport, pack

Split = Literal["train", "val", "test"]

VALIDATION_IMAGES = 400
"Of 4000 training images."
SPLIT_SEED = 0
"Of the choice of validation images, and of the order in which images are taken."


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one image."""

    image: str
    "File name."
    text: str
    "The question."
    answer: str
    "One of 13 words."


def write_split(split: Split, out: Path, *, limit: int | None, samples_per_tar: int) -> PackReport:
    """One split as `out/<split>.json` and tars.

    Args:
        limit: stop before the image whose questions would exceed it; by default all.
    """
    questions = take_images(read_questions(split), limit)
    out.mkdir(parents=True, exist_ok=True)
    annotations = out / f"{split}.json"
    entries = to_llava(questions, id_prefix=split)
    annotations.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    images = image_folder(split)
    return pack(annotations, images, out, samples_per_tar=samples_per_tar, prefix=split)


def read_questions(split: Split) -> list[Question]:
    """The questions of one split, images in a seeded order, questions of an image in their own."""
    getter = easy_vqa.get_test_questions if split == "test" else easy_vqa.get_train_questions
    of_image: dict[int, list[Question]] = {}
    for text, answer, image in zip(*getter(), strict=True):
        question = Question(image=f"{image}.png", text=text, answer=answer)
        of_image.setdefault(image, []).append(question)
    images = sorted(of_image)
    random.Random(SPLIT_SEED).shuffle(images)
    chosen = {
        "train": images[VALIDATION_IMAGES:], "val": images[:VALIDATION_IMAGES], "test": images
    }[split]  # fmt: skip
    return [question for image in chosen for question in of_image[image]]


def take_images(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """The first questions, at most `limit`, without parting those of one image."""
    if limit is None or limit >= len(questions):
        return list(questions)
    end = limit
    while end and questions[end].image == questions[end - 1].image:
        end -= 1
    return list(questions[:end])


def to_llava(questions: Sequence[Question], *, id_prefix: str) -> list[Mapping[str, Any]]:
    """LLaVA-format annotations; ids are `<prefix>-<image>-<number of the question>`."""
    asked: dict[str, int] = {}
    annotations = []
    for question in questions:
        number = asked[question.image] = asked.get(question.image, -1) + 1
        turns = [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ]
        name = f"{id_prefix}-{Path(question.image).stem}-{number:02d}"
        annotations.append({"id": name, "image": question.image, "conversations": turns})
    return annotations


def image_folder(split: Split) -> Path:
    """Where the package keeps the images of a split."""
    paths = easy_vqa.get_test_image_paths() if split == "test" else easy_vqa.get_train_image_paths()
    return Path(next(iter(paths.values()))).parent
