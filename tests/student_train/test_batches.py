"""The same global batch gives the same loss and gradient however it is split, and over a plan of
batches every sample has its turn.
"""

import dataclasses
import gc
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, StackDataset

from shared.cache import Cache, open_cache
from shared.samples import Member, SampleEntry
from shared.spec import canonical_digest
from student_train.batch import TrainingBatch
from student_train.entries import Entries
from student_train.loading import micro_batches, plan_epoch
from student_train.loop import make_accelerator
from student_train.student import TERMS
from student_train.training_set import TrainingSet
from tests.processes import run_two
from tests.student_train.support import (
    aligned,
    batches_of,
    distance,
    gradients_of,
    recipe,
    relative,
    tensors_of,
    training_set,
)

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


def assert_same_terms(found: dict[str, float], expected: dict[str, float]) -> None:
    """Within 1e-5 relative, term by term."""
    assert found.keys() == expected.keys()
    unequal = {name: relative(found[name], expected[name]) for name in expected}
    assert max(unequal.values()) < 1e-5, unequal


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

    assert_same_terms(terms, whole[0])
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


CASES: dict[str, Any] = {
    "one text-only process": {"order": MIXED, "micro_batch": 4},
    # So that the one pass that synchronises uses neither the projector nor the adapters.
    "text-only last micro-batches": {"order": [0, 1, 3, 4, 2, 5, 8, 11], "micro_batch": 2},
}


def test_two_processes_give_the_loss_and_gradient_of_one(
    tars: list[Path], full_path: Path, tmp_path: Path, whole: tuple[Any, Any]
) -> None:
    run_two(write_gradients, tars, full_path, tmp_path, folder=tmp_path)

    for case, rank in itertools.product(CASES, (0, 1)):
        terms = json.loads((tmp_path / f"{case}-{rank}.json").read_text())
        gradients = load_file(tmp_path / f"{case}-{rank}.safetensors")
        assert_same_terms(terms, whole[0])
        assert distance(whole[1], gradients) < 1e-5


def write_gradients(tars: list[Path], cache_path: Path, out: Path) -> None:
    """In one of two processes: loss terms and gradients of its share of each case."""
    accelerator = make_accelerator(recipe(), cpu=True)
    assert accelerator.num_processes == 2
    rank, cache = accelerator.process_index, open_cache(cache_path)
    for name, case in CASES.items():
        changed = recipe(micro_batch=case["micro_batch"])
        samples = training_set(tars, changed, cache)
        mine = list(batches_of(samples, case["order"][rank::2], changed.micro_batch))
        terms, gradients = gradients_of(aligned(changed, cache), mine, changed)
        (out / f"{name}-{rank}.json").write_text(json.dumps(terms))
        save_file(gradients, out / f"{name}-{rank}.safetensors")
    gc.collect()  # as in `run_training`
    accelerator.end_training()


def test_the_first_case_leaves_one_process_without_images(mixed: TrainingSet) -> None:
    (mine,) = batches_of(mixed, MIXED[1::2], 4)

    assert not mine.sequences.with_image.any()
    assert len(mine.pixels) == 0


@pytest.mark.parametrize("grouped", [False, True])
def test_a_plan_holds_every_sample_at_most_once_per_epoch(grouped: bool) -> None:
    lengths = np.arange(50) % 7

    plan = plan_epoch(lengths, recipe(group_by_length=grouped), 0)

    assert plan.shape == (6, 8)
    assert len(set(plan.ravel().tolist())) == 48


def test_a_plan_depends_on_seed_and_epoch_alone() -> None:
    lengths = np.arange(64) % 7
    plans = [
        plan_epoch(lengths, recipe(seed=seed), epoch).tolist()
        for seed, epoch in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]

    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert plans[0] != plans[3]
    assert recipe(micro_batch=1, workers=1) != recipe()
    assert plan_epoch(lengths, recipe(micro_batch=1, workers=1), 0).tolist() == plans[0]


def test_every_epoch_leaves_out_other_samples() -> None:
    left = [
        set(range(50)) - set(plan_epoch(np.ones(50, dtype=np.int64), recipe(), n).ravel().tolist())
        for n in range(4)
    ]

    assert all(len(samples) == 2 for samples in left)
    assert len(set.union(*left)) > 4


def test_batches_grouped_by_length_need_less_padding_and_come_in_random_order() -> None:
    lengths = np.random.default_rng(0).integers(150, 2000, size=400)

    def padding(grouped: bool) -> int:
        batches = lengths[plan_epoch(lengths, recipe(group_by_length=grouped), 0)]
        return int((batches.max(axis=1, keepdims=True) - batches).sum())

    assert padding(True) < padding(False) / 10
    longest = lengths[plan_epoch(lengths, recipe(group_by_length=True), 0)].max(axis=1)
    assert longest.tolist() != sorted(longest.tolist(), reverse=True)


def test_the_identity_of_a_training_set_is_the_digest_of_its_lengths_by_key(
    mixed: TrainingSet,
) -> None:
    odd = [dataclasses.replace(e, key=f'{n:02d} é"\\') for n, (_, e) in enumerate(mixed.entries)]
    entries = Entries((tar, entry) for (tar, _), entry in zip(mixed.entries, odd, strict=True))
    samples = dataclasses.replace(mixed, entries=entries)

    lengths = zip((entry.key for entry in odd), samples.lengths.tolist(), strict=True)

    assert samples.identity == {"samples": len(samples), "sha256": canonical_digest(dict(lengths))}


def test_entries_are_what_they_were_made_of() -> None:
    near, far = Member(offset=0, size=7), Member(offset=2**40, size=2**26)
    given = [
        (Path("a.tar"), SampleEntry(key="ä/0", annotation=near, image=far)),
        (Path("b.tar"), SampleEntry(key="1", annotation=far, image=None)),
        (Path("a.tar"), SampleEntry(key="22", annotation=far, image=near)),
    ]

    entries = Entries(given)

    assert [*entries] == given
    assert len(entries) == 3


def seen(
    samples: TrainingSet, *, first: int, last: int, rank: int = 0, world: int = 1
) -> list[list[list[int]]]:
    """Lengths of the samples of each step's micro-batches."""
    steps = micro_batches(
        samples, first_step=first, last_step=last, rank=rank, world=world,
        device=torch.device("cpu"),
    )  # fmt: skip
    return [[batch.sequences.lengths.tolist() for batch in step] for step in steps]


def test_spawned_workers_make_the_batches_of_one_process(
    tars: list[Path], full_cache: Cache
) -> None:
    with_cache_and_without = [training_set(tars, recipe(), source) for source in (full_cache, None)]
    samples = StackDataset(*with_cache_and_without)
    order = [[0, 2, 1], [5, 3], [8, 4, 11]]

    loader: DataLoader[tuple[TrainingBatch, ...]] = DataLoader(
        samples, sampler=order, batch_size=None, num_workers=2, multiprocessing_context="spawn"
    )

    for numbers, batches in zip(order, loader, strict=True):
        for here, there in zip(samples[numbers], batches, strict=True):
            for (where, mine), (_, theirs) in zip(tensors_of(here), tensors_of(there), strict=True):
                assert torch.equal(mine, theirs), where


def numbered(samples: TrainingSet, **changes: Any) -> TrainingSet:
    """The same samples under another recipe."""
    return dataclasses.replace(samples, recipe=recipe(**changes))


def test_a_resumed_run_goes_on_with_the_very_next_sample(mixed: TrainingSet) -> None:
    samples = numbered(mixed, epochs=2, micro_batch=2)
    whole_run = seen(samples, first=0, last=6)

    assert seen(samples, first=4, last=6) == whole_run[4:]
    assert len(whole_run) == 6
    assert all(len(step) == 4 for step in whole_run)


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_covers_the_same_global_batches(
    mixed: TrainingSet, world: int
) -> None:
    samples = numbered(mixed, micro_batch=2)
    alone = seen(samples, first=0, last=3)

    shared = [seen(samples, first=0, last=3, rank=rank, world=world) for rank in range(world)]

    for step in range(3):
        together = [n for rank in shared for batch in rank[step] for n in batch]
        assert sorted(together) == sorted(n for batch in alone[step] for n in batch)


def test_worker_processes_give_the_batches_of_none(mixed: TrainingSet) -> None:
    assert seen(numbered(mixed, workers=2, micro_batch=2), first=0, last=3) == seen(
        numbered(mixed, micro_batch=2), first=0, last=3
    )


def test_every_epoch_of_a_run_has_the_batches_of_its_own_plan(
    tars: list[Path], full_cache: Cache
) -> None:
    samples = training_set(tars, recipe(epochs=2, micro_batch=2), full_cache)

    steps = [[n for part in step for n in part] for step in seen(samples, first=0, last=6)]

    plans = [plan_epoch(samples.lengths, samples.recipe, epoch) for epoch in (0, 1)]
    assert steps == [samples.lengths[batch].tolist() for plan in plans for batch in plan]
    assert steps[:3] != steps[3:]
