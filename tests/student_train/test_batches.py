"""The same global batch gives the same loss and gradient however it is split, and over a plan of
batches every sample has its turn.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shared.cache import Cache
from student_train.data import TrainingSet
from student_train.student import TERMS
from tests.student_train.support import (
    aligned,
    batches_of,
    distance,
    gradients_of,
    recipe,
    relative,
    run_process,
    training_set,
)

CHILD = Path(__file__).parent / "one_of_two.py"
MIXED = [0, 2, 1, 5, 3, 8, 4, 11]
"One global batch; taken by turns, one process gets 0 1 3 4 and the other, text only, 2 5 8 11."


@pytest.fixture(scope="module")
def mixed(tars: list[Path], full_cache: Cache) -> TrainingSet:
    return training_set(tars, recipe(), full_cache)


@pytest.fixture(scope="module")
def whole(mixed: TrainingSet, full_cache: Cache) -> tuple[Any, Any]:
    """Terms and gradients of the batch in one piece."""
    student = aligned(mixed.recipe, full_cache)
    return gradients_of(student, list(batches_of(mixed, MIXED, 8)), mixed.recipe)


def test_the_batch_is_mixed(mixed: TrainingSet) -> None:
    assert len({int(mixed.lengths[n]) for n in MIXED}) > 4
    (batch,) = batches_of(mixed, MIXED, 8)
    assert batch.sequences.with_image.tolist() == [True, False] * 4


def test_every_loss_term_is_computed_and_reaches_what_is_trained(whole: tuple[Any, Any]) -> None:
    terms, gradients = whole

    assert set(terms) == {"loss", *TERMS}
    assert all(value > 0 for value in terms.values())
    assert terms["loss"] == pytest.approx(sum(terms[name] for name in TERMS), rel=1e-6)
    for part in (
        "model.projector.",
        "model.llm.lm_head",
        "adapters.attention.1",
        "adapters.vision",
    ):
        assert any(g.abs().sum() > 0 for name, g in gradients.items() if name.startswith(part)), (
            part
        )
    assert not any(name.startswith("model.tower.") for name in gradients)


@pytest.mark.parametrize("size", [4, 2, 1])
def test_loss_and_gradient_do_not_depend_on_the_micro_batch(
    size: int, mixed: TrainingSet, full_cache: Cache, whole: tuple[Any, Any]
) -> None:
    student = aligned(mixed.recipe, full_cache)

    terms, gradients = gradients_of(student, list(batches_of(mixed, MIXED, size)), mixed.recipe)

    assert {
        name: relative(terms[name], whole[0][name]) < 1e-5 for name in whole[0]
    } == dict.fromkeys(whole[0], True)
    assert distance(whole[1], gradients) < 1e-5


def test_a_text_only_neighbour_changes_no_alignment_term(
    mixed: TrainingSet, full_cache: Cache, whole: tuple[Any, Any]
) -> None:
    images_only = [n for n in MIXED if n % 3 != 2]

    terms, _ = gradients_of(
        aligned(mixed.recipe, full_cache), list(batches_of(mixed, images_only, 8)), mixed.recipe
    )

    for name in ("attention", "vision_all", "vision_focus"):
        assert relative(terms[name], whole[0][name]) < 1e-5


# In the first case one process has text only. In the second the last micro-batch of both is text
# only, so that the one pass that synchronises uses neither the projector nor the adapters.
@pytest.mark.parametrize(
    ("order", "micro_batch"), [(MIXED, 4), ([0, 1, 3, 4, 2, 5, 8, 11], 2)],
    ids=["one text-only process", "text-only last micro-batches"],
)  # fmt: skip
def test_two_processes_give_the_loss_and_gradient_of_one(
    order: list[int], micro_batch: int, tars: list[Path], full_path: Path, whole: tuple[Any, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    settings = {
        "order": order, "micro_batch": micro_batch, "tars": [str(tar) for tar in tars],
        "cache": str(full_path), "out": str(tmp_path),
    }  # fmt: skip
    root = Path(__file__).parents[2]

    run_process(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(CHILD), json.dumps(settings)],
        cwd=root,
    )  # fmt: skip

    for rank in range(2):
        terms = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {name: relative(terms[name], whole[0][name]) < 1e-5 for name in terms} == (
            dict.fromkeys(whole[0], True)
        )
        assert distance(whole[1], load_file(tmp_path / f"{rank}.safetensors")) < 1e-5
