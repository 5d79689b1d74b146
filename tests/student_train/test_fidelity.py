"""What a cache's encodings do to a student: nothing where nothing is lost, else what the training
loop would see.
"""

import json
from pathlib import Path

import pytest
import torch

from shared.cache import Cache, open_cache
from shared.errors import MismatchError, TrainingError
from student_train.config import Recipe
from student_train.fidelity import (
    StudentFidelity,
    _Record,
    cosine,
    fitted,
    inputs_of,
    load_pair,
    measure_student,
)
from tests.student_train.support import SPEC, STUDENT, aligned, gradients_of, recipe, training_set
from tests.support import CLIP, build

RECIPE = {"global_batch": 8, "micro_batch": 4}
COARSE = {
    **SPEC,
    "attention": {**SPEC["attention"], "encoding": "sqrt4"},
    "vision_tokens": {"encoding": "channel4"},
    "logprobs": {**SPEC["logprobs"], "encoding": "logprob8"},
}


def measure(exact: Cache, cache: Cache, tars: list[Path], changed: Recipe) -> StudentFidelity:
    inputs = inputs_of(str(STUDENT), str(CLIP), cache, [str(tar) for tar in tars])
    pair = load_pair(inputs, changed, exact, cache, "student")
    return measure_student(pair, torch.device("cpu"))


@pytest.mark.parametrize("saving", [False, True])
def test_exact_targets_give_the_exact_loss_and_gradient(
    full_cache: Cache, tars: list[Path], saving: bool
) -> None:
    found = measure(full_cache, full_cache, tars, recipe(**RECIPE, gradient_checkpointing=saving))

    assert (found.steps, found.batch) == (3, 8)
    assert set(found.terms) == {"sup", "kl", "attention", "vision_all", "vision_focus", "loss"}
    assert set(found.groups) == {"language model", "projector", "adapters"}
    assert all(term.worst_error == 0 for term in found.terms.values())
    for part in (*found.terms.values(), *found.groups.values()):
        assert part.worst_cosine == pytest.approx(1, abs=1e-12)


def test_the_cosine_is_that_of_the_gradients_of_the_training_loop(
    full_cache: Cache, tars: list[Path], tmp_path: Path
) -> None:
    build(tmp_path / "coarse", tars, COARSE)
    coarse, changed = open_cache(tmp_path / "coarse"), recipe(global_batch=24, micro_batch=24)

    found = measure(full_cache, coarse, tars, changed)

    (exact, gradient), (decoded, other) = (
        gradients_of(
            aligned(changed, cache), [training_set(tars, changed, cache)[range(24)]], changed
        )
        for cache in (full_cache, coarse)
    )
    assert found.terms["loss"].value == pytest.approx(exact["loss"], rel=1e-5)
    error = abs(decoded["loss"] - exact["loss"]) / exact["loss"]
    assert found.terms["loss"].error == pytest.approx(error, rel=0.01)
    expected = cosine(gradient, other)
    assert expected is not None
    assert 1 - found.terms["loss"].cosine == pytest.approx(1 - expected, rel=0.01)
    assert expected < 1
    assert found.terms["sup"].worst_error == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [("{", "run.json: cannot be read"), ('{"cache": null}', "was trained without a cache")],
)
def test_a_run_that_cannot_stand_for_a_student_is_refused(
    full_cache: Cache, tmp_path: Path, settings: str, message: str
) -> None:
    (tmp_path / "run.json").write_text(settings)

    with pytest.raises(TrainingError, match=message):
        inputs_of(str(tmp_path), None, full_cache, [])


def test_a_run_stands_for_its_export_and_its_adapters(full_cache: Cache, tmp_path: Path) -> None:
    accepted = {"tokenizer": {"cache": 1, "run": 2}}
    settings = {"cache": {"digest": "x"}, "accepted_mismatches": accepted}
    (tmp_path / "run.json").write_text(json.dumps(settings))

    inputs = inputs_of(str(tmp_path), None, full_cache, [])

    assert inputs.student == str(tmp_path / "export")
    assert inputs.adapters == tmp_path / "adapters.safetensors"
    assert list(inputs.accept) == ["tokenizer"]


def test_another_template_is_refused(full_cache: Cache, tars: list[Path]) -> None:
    with pytest.raises(MismatchError, match="template") as error:
        measure(full_cache, full_cache, tars, recipe(**RECIPE, template="plain"))

    assert "name the folder of a run as --student" in str(error.value)
    assert "--accept-mismatch" not in str(error.value)


@pytest.mark.parametrize(
    ("samples", "micro", "batch"), [(100, 4, 8), (8, 4, 8), (7, 4, 4), (3, 3, 3)]
)
def test_batches_are_the_recipes_as_far_as_the_samples_go(
    samples: int, micro: int, batch: int
) -> None:
    found = fitted(recipe(**RECIPE), samples)

    assert (found.micro_batch, found.global_batch) == (micro, batch)


def test_a_terms_value_does_not_depend_on_the_micro_batch(
    full_cache: Cache, tars: list[Path]
) -> None:
    found, whole = (
        measure(full_cache, full_cache, tars, recipe(global_batch=24, micro_batch=micro)).terms
        for micro in (4, 24)
    )

    assert {name: term.value for name, term in found.items()} == pytest.approx(
        {name: term.value for name, term in whole.items()}, rel=1e-5
    )


def test_a_report_holds_the_mean_and_the_worst_of_the_steps() -> None:
    record = _Record()
    for exact, decoded, found in ((4.0, 4.0, 1.0), (2.0, 3.0, 0.5), (-4.0, -3.0, None)):
        record.add_values(exact, decoded)
        record.add(found)

    term = record.term()

    assert (term.value, term.error, term.worst_error) == (pytest.approx(2 / 3), 0.25, 0.5)
    assert (term.cosine, term.worst_cosine) == (0.75, 0.5)
