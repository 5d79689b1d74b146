"""The demo, `make demo`: a cache from a small teacher, then a student without it and one with it.

Everything printed at the end is measured in this run.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from examples.easy_vqa.pictures import Answered, draw
from examples.easy_vqa.steps import (
    SPEC,
    TEACHER,
    TRAIN_QUESTIONS,
    StudentResult,
    build,
    prepare_split,
    run,
    train,
    write_student,
)
from shared.capture import catch_query_key, text_to_vision
from shared.checkpoint import ModelFolder
from shared.console import bytes_text
from shared.images import ImageProcessor, decode_image
from shared.mobilevlm import GRID, MobileVLM, load_model
from shared.samples import Sample, index_tar, read_sample
from shared.sequence import pad_sequences
from shared.tar_names import expand_tars
from shared.tokenizer import load_tokenizer
from student_train.evaluate import HeldOutSample, HeldOutSet

OUT = Path("demo-run")
TEST_QUESTIONS = 2000
"Of 9,673."
PICTURES = (3, 25, 48, 90)
"Test questions that are drawn."


def main() -> None:
    """Run all of it; a table on stdout, pictures in demo-run/pictures."""
    begun = time.monotonic()
    if OUT.exists():
        print(f"removing the last run's {OUT}/", file=sys.stderr)
        shutil.rmtree(OUT)
    train_tars = prepare_split(OUT / "data", "train", TRAIN_QUESTIONS)
    test_tars = prepare_split(OUT / "data", "test", TEST_QUESTIONS)
    building = time.monotonic()
    cache = build(OUT, train_tars, SPEC)
    building = time.monotonic() - building
    models = write_student(OUT, seed=0)
    results = {
        who: train(OUT / who.lower(), models, train_tars, test_tars, teaching, seed=0)
        for who, teaching in (("baseline", None), ("Align-KD", cache))
    }
    summary = json.loads(run("cache-tools", "info", cache, "--json"))
    teacher = held_out(test_tars).score(load_model(ModelFolder(str(TEACHER))).eval())
    print_table(teacher.exact_match or 0.0, results)
    size = sum(summary["sizes"].values())
    print(
        f"\ncache: {summary['samples']} samples, {bytes_text(size)} "
        f"({bytes_text(size / summary['samples'])} a sample), built in {building:.0f} s"
    )
    draw_examples(test_tars, {"teacher": TEACHER, **{w: r.export for w, r in results.items()}})
    print(f"pictures: {OUT}/pictures/*.png\nall of it: {time.monotonic() - begun:.0f} s")


def print_table(teacher: float, results: dict[str, StudentResult]) -> None:
    """Who answers how many test questions exactly right."""
    print(f"\n{'':<18}{'exact match':>12}{'questions':>11}{'steps':>8}{'seconds':>9}")
    answers = next(iter(results.values())).answers
    print(f"{'teacher':<18}{100 * teacher:>10.2f} %{answers:>11}{'-':>8}{'-':>9}")
    for who, result in results.items():
        print(
            f"{who + ' student':<18}{100 * result.exact_match:>10.2f} %{result.answers:>11}"
            f"{result.steps:>8}{result.seconds:>9.0f}"
        )


def held_out(tars: str) -> HeldOutSet:
    """The test questions, for models with the teacher's tokenizer and tower."""
    return HeldOutSet(
        expand_tars([tars]), template="v1", max_tokens=2048, tokenizer=load_tokenizer(TEACHER),
        processor=ImageProcessor(TEACHER / "clip", "pad"), limit=None, max_new_tokens=8,
    )  # fmt: skip


def draw_examples(tars: str, folders: dict[str, Path]) -> None:
    """One picture per example: who looks where, and what each answers."""
    entries = [(tar, entry) for tar in expand_tars([tars]) for entry in index_tar(tar).samples]
    models = {who: load_model(ModelFolder(str(f))).eval() for who, f in folders.items()}
    (OUT / "pictures").mkdir()
    for number in PICTURES:
        sample = read_sample(*entries[number])
        assert sample.image is not None
        question, answer = (turn.text for turn in sample.conversation.turns)
        draw(
            np.asarray(decode_image(sample.image)),
            question.removeprefix("<image>\n"),
            answer,
            [ask(who, model, sample, held_out(tars)) for who, model in models.items()],
            OUT / "pictures" / f"{sample.key}.png",
        )


def ask(who: str, model: MobileVLM, sample: Sample, held: HeldOutSet) -> Answered:
    """One model's greedy answer and its first layer's mean attention over the vision tokens."""
    prepared = held.prepare(sample)
    ((answer,),) = held.answers(model, [prepared])
    return Answered(who=who, answer=answer, attention=first_layer_attention(model, prepared))


@torch.inference_mode()
def first_layer_attention(model: MobileVLM, sample: HeldOutSample) -> np.ndarray:
    """[12, 12]: A_tv of layer 0, mean over heads and text rows."""
    assert sample.pixels is not None
    batch = pad_sequences([sample.prompt.input_ids], [sample.prompt.labels])
    embeds = model.embed(batch.ids, batch.vision_mask, model.encode_images(sample.pixels[None]))
    with catch_query_key(model.llm.model.layers, [0]) as caught:
        model.llm.model(inputs_embeds=embeds, use_cache=False)
    rows = int(batch.num_text_rows[0])
    attention = text_to_vision(caught[0], batch.vision_start, batch.lengths, rows)
    return attention[0].mean(dim=(0, 1)).reshape(GRID, GRID).numpy()


if __name__ == "__main__":
    main()
