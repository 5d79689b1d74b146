"""What a step of a run does, and in which number format."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from shared.cache import Cache
from shared.checkpoint import ModelFolder
from shared.images import ImageProcessor
from shared.mobilevlm import load_model
from shared.tokenizer import load_tokenizer
from student_train import loop
from student_train.evaluate import HeldOutSet
from student_train.loop import make_accelerator, make_optimizer
from student_train.runs import RunFolder
from student_train.setup import make_student
from tests.student_train.support import STUDENT, aligned, log_lines, recipe, train, training_set
from tests.support import CLIP


def test_a_step_moves_by_the_gradient_of_its_own_batch_alone(
    tars: list[Path], tmp_path: Path
) -> None:
    """A rate of next to nothing: every step finds the student that the first one found."""
    still = {"lr": 1e-12, "projector_lr": 1e-12, "warmup": 0.0}
    both = {"group_by_length": False, "global_batch": 24, "epochs": 2, "optim": still}
    train(tmp_path / "run", tars, None, **both)

    first, second = log_lines(tmp_path / "run")

    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)


def test_weights_decay_as_the_recipe_says(full_cache: Cache) -> None:
    changed = recipe(optim={"lr": 1e-3, "projector_lr": 2e-3, "weight_decay": 0.25})

    optimizer = make_optimizer(aligned(changed, full_cache), changed)

    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25] * 3


def test_a_run_evaluates_in_the_number_format_that_it_trains_in(
    tars: list[Path], tmp_path: Path
) -> None:
    found = {}
    for precision in ("float32", "bfloat16"):
        once = {"precision": precision, "max_steps": 1, "optim": {"lr": 1e-12}, "max_new_tokens": 1}
        result = train(tmp_path / precision, tars, None, "--eval-data", tars[1], **once)
        assert result.exit_code == 0, result.output
        (found[precision],) = (
            line["eval_loss"] for line in log_lines(tmp_path / precision) if "eval_loss" in line
        )
        AcceleratorState._reset_state(reset_partial_state=True)

    assert found["bfloat16"] != pytest.approx(found["float32"], rel=1e-5)
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.02)


def test_a_run_recomputes_layers_before_and_after_an_evaluation(
    tars: list[Path], tmp_path: Path
) -> None:
    changed = recipe(
        gradient_checkpointing=True, max_steps=2, eval_every=1, save_every=2, max_new_tokens=1
    )
    accelerator = make_accelerator(changed, cpu=True)
    student = make_student(load_model(ModelFolder(str(STUDENT)), str(CLIP)), changed, None, None)
    calls: list[bool] = []
    student.model.llm.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, _: calls.append(module.training)
    )
    held_out = HeldOutSet(
        tars[:1], template="v1", max_tokens=2048, tokenizer=load_tokenizer(STUDENT),
        processor=ImageProcessor(CLIP, "pad"), limit=1, max_new_tokens=1,
    )  # fmt: skip

    loop.train(
        student, training_set(tars, changed, None), held_out, RunFolder(tmp_path), accelerator, None
    )

    assert sum(calls) == 2 * 2  # twice a step
    assert calls[-1] is False
