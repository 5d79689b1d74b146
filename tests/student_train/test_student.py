"""The student module: what is captured, what is trained, and what must not change a number."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.cache import Cache
from student_train.loop import make_optimizer
from student_train.student import TERMS, Adapters, TeacherShape
from student_train.training_set import TrainingSet
from tests.student_train.support import (
    STUDENT,
    aligned,
    batches_of,
    distance,
    exported,
    gradients_of,
    recipe,
    relative,
    train,
    training_set,
)

IMAGES, TEXT = [0, 1, 3, 4], [2, 5, 8, 11]


@pytest.fixture(scope="module")
def mixed(tars: list[Path], full_cache: Cache) -> TrainingSet:
    return training_set(tars, recipe(), full_cache)


def test_gradient_checkpointing_changes_neither_loss_nor_gradient(
    mixed: TrainingSet, full_cache: Cache
) -> None:
    batches = list(batches_of(mixed, [*IMAGES, *TEXT], 4))
    plain, recomputed = (
        gradients_of(aligned(changed, full_cache), batches, changed)
        for changed in (recipe(), recipe(gradient_checkpointing=True))
    )

    assert max(relative(plain[0][name], recomputed[0][name]) for name in plain[0]) < 1e-6
    assert distance(plain[1], recomputed[1]) < 1e-6


def test_gradient_checkpointing_recomputes_the_layers(
    mixed: TrainingSet, full_cache: Cache
) -> None:
    (batch,) = batches_of(mixed, IMAGES, 4)
    runs = []
    for changed in (recipe(), recipe(gradient_checkpointing=True)):
        student = aligned(changed, full_cache)
        calls: list[int] = []
        student.model.llm.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        gradients_of(student, [batch], changed)
        runs.append(len(calls))

    assert runs == [1, 2]


def test_bfloat16_gives_a_loss_near_float32s(mixed: TrainingSet, full_cache: Cache) -> None:
    from accelerate.state import AcceleratorState

    batches = list(batches_of(mixed, [*IMAGES, *TEXT], 4))
    exact, _ = gradients_of(aligned(recipe(), full_cache), batches, recipe())
    AcceleratorState._reset_state(reset_partial_state=True)
    half = recipe(precision="bfloat16")
    found, gradients = gradients_of(aligned(half, full_cache), batches, half)

    assert found != exact  # it did run in another format
    assert max(relative(found[name], exact[name]) for name in TERMS) < 0.02
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


def test_attention_is_captured_of_the_named_layers_while_all_stay_sdpa(
    mixed: TrainingSet, full_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch,) = batches_of(mixed, IMAGES, 4)
    changed = recipe(loss={"layer_map": {0: 1}})
    student = aligned(changed, full_cache)
    maps: list[tuple[int, ...]] = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax",
        lambda self, *a, **k: (maps.append(tuple(self.shape)), softmax(self, *a, **k))[1],
    )  # fmt: skip

    student(batch)

    assert student.model.llm.config._attn_implementation == "sdpa"
    rows = int(batch.sequences.num_text_rows.max())
    assert maps == [(4, 2, rows, batch.sequences.ids.shape[1])]  # the needed rows of one layer
    assert not student.model.llm.model.layers[1].self_attn.q_proj._forward_hooks


def test_the_layer_map_says_which_student_layer_each_teacher_layer_teaches(
    mixed: TrainingSet, full_cache: Cache
) -> None:
    (batch,) = batches_of(mixed, IMAGES, 4)
    found = {}
    for layer_map in ({0: 0}, {0: 1}, {1: 0}, {0: 0, 1: 1}, {0: 1, 1: 0}):
        student = aligned(recipe(loss={"layer_map": layer_map}), full_cache)
        assert student.adapters is not None
        for adapter in student.adapters.attention.values():
            torch.nn.init.constant_(adapter.weight, 0.1)  # all adapters alike
        assert set(student.adapters.attention) == {str(layer) for layer in layer_map}
        found[tuple(layer_map.items())] = student(batch)["attention"].item()

    assert found[((0, 0),)] != pytest.approx(found[((0, 1),)], rel=1e-6)
    assert found[((0, 0),)] != pytest.approx(found[((1, 0),)], rel=1e-6)
    crossed = (found[((0, 1),)] + found[((1, 0),)]) / 2  # the term is the mean over layers
    assert found[((0, 1), (1, 0))] == pytest.approx(crossed, rel=1e-5)


def test_the_attention_gradient_reaches_queries_and_keys_of_the_taught_layer_only(
    mixed: TrainingSet, full_cache: Cache
) -> None:
    (batch,) = batches_of(mixed, IMAGES, 4)
    student = aligned(recipe(loss={"layer_map": {0: 0}}), full_cache)

    student(batch)["attention"].backward()

    reached = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert "model.llm.model.layers.0.self_attn.q_proj.weight" in reached
    assert "model.llm.model.layers.0.self_attn.k_proj.weight" in reached
    assert "model.llm.model.layers.0.self_attn.v_proj.weight" not in reached
    assert not any(name.startswith("model.llm.model.layers.1") for name in reached)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_text_only_batch_trains_with_supervision_and_kl_alone(
    checkpointing: bool, mixed: TrainingSet, full_cache: Cache
) -> None:
    changed = recipe(gradient_checkpointing=checkpointing)
    student = aligned(changed, full_cache)

    terms, gradients = gradients_of(student, list(batches_of(mixed, TEXT, 2)), changed)

    assert {name for name, value in terms.items() if value} == {"loss", "sup", "kl"}
    assert gradients["model.llm.lm_head.weight"].any()
    assert not any(name.startswith(("model.projector", "adapters")) for name in gradients)


@pytest.mark.parametrize(
    ("loss", "terms"),
    [
        ({"kl": 0.0}, {"sup", "attention", "vision_all", "vision_focus"}),
        ({"attention": 0.0}, {"sup", "kl", "vision_all", "vision_focus"}),
        ({"vision": 0.0}, {"sup", "kl", "attention"}),
        ({"focus_tokens": 0}, {"sup", "kl", "attention", "vision_all"}),
        ({"kl": 0.0, "attention": 0.0, "vision": 0.0}, {"sup"}),
    ],
)
def test_a_weight_of_zero_leaves_a_term_out(
    loss: dict[str, float], terms: set[str], tars: list[Path], full_cache: Cache
) -> None:
    changed = recipe(loss=loss)
    samples = training_set(tars, changed, full_cache)

    found, gradients = gradients_of(
        aligned(changed, full_cache), list(batches_of(samples, IMAGES, 2)), changed
    )

    assert set(found) == {"loss", *terms}
    vision_adapter = any(name.startswith("adapters.vision") for name in gradients)
    assert vision_adapter == ("vision_all" in terms)


def test_weights_scale_their_terms(mixed: TrainingSet, full_cache: Cache) -> None:
    batches = list(batches_of(mixed, IMAGES, 4))
    weights = {"kl": 2.0, "attention": 3.0, "vision": 5.0}
    changed = recipe(loss=weights)

    terms, _ = gradients_of(aligned(changed, full_cache), batches, changed)

    vision = terms["vision_all"] + terms["vision_focus"]
    whole = terms["sup"] + 2 * terms["kl"] + 3 * terms["attention"] + 5 * vision
    assert terms["loss"] == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("train_tower", [False, True])
def test_the_tower_changes_only_if_it_is_trained(
    train_tower: bool, tars: list[Path], full_cache: Cache, tmp_path: Path
) -> None:
    from student_train.loop import make_accelerator
    from student_train.loop import train as train_loop
    from student_train.runs import RunFolder

    changed = recipe(train_tower=train_tower, max_steps=2)
    student = aligned(changed, full_cache)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    train_loop(
        student, training_set(tars, changed, full_cache), None, RunFolder(tmp_path),
        make_accelerator(changed, cpu=True), None,
    )  # fmt: skip

    same = {name for name, tensor in student.state_dict().items() if tensor.equal(before[name])}
    tower = {name for name in before if name.startswith("model.tower.")}
    buffers = {name for name, _ in student.named_buffers()}
    # The bias of a key shifts all scores of a query alike: softmax, so the loss, cannot see it.
    assert same - buffers - {n for n in tower if n.endswith("k_proj.bias")} == (
        set() if train_tower else tower - {n for n in tower if n.endswith("k_proj.bias")} - buffers
    )
    assert len(tower) > 20


def test_without_a_cache_there_are_no_adapters_and_only_the_supervised_term(
    tars: list[Path], tmp_path: Path
) -> None:
    result = train(tmp_path / "run", tars, None, max_steps=1)

    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "run" / "adapters.safetensors").exists()
    student = aligned(recipe(), None)
    assert student.adapters is None
    assert student.weights() == (1.0, 0.0, 0.0, 0.0, 0.0)


def test_the_shallowest_layer_says_where_to_focus(mixed: TrainingSet, full_cache: Cache) -> None:
    (batch,) = batches_of(mixed, IMAGES, 4)
    assert batch.targets is not None
    deeper = {"": torch.zeros_like(batch.targets.attention[1][""])}
    attention = {**batch.targets.attention, 1: deeper}
    other = replace(batch, targets=replace(batch.targets, attention=attention))
    student = aligned(recipe(), full_cache)

    assert student(batch)["vision_focus"].item() == student(other)["vision_focus"].item()


def test_each_part_has_its_rate_and_the_language_models_comes_first(full_cache: Cache) -> None:
    changed = recipe(optim={"lr": 1e-3, "projector_lr": 2e-3, "adapter_lr": 3e-3})
    student = aligned(changed, full_cache)
    names = {parameter: name for name, parameter in student.named_parameters()}

    groups = make_optimizer(student, changed).param_groups

    assert [
        (group["lr"], {".".join(names[p].split(".")[:2]) for p in group["params"]})
        for group in groups
    ] == [
        (1e-3, {"model.llm"}),
        (3e-3, {"adapters.attention", "adapters.vision"}),
        (2e-3, {"model.projector"}),
    ]


def test_gradients_are_clipped_before_the_step(tars: list[Path], tmp_path: Path) -> None:
    # So far that AdamW's epsilon, beside which it divides, is all that is left.
    optim = {"lr": 1e-3, "clip_norm": 1e-12, "weight_decay": 0.0}
    train(tmp_path / "run", tars, None, max_steps=1, optim=optim)

    before = torch.load(STUDENT / "pytorch_model.bin", weights_only=True)["lm_head.weight"]
    assert (exported(tmp_path / "run")["lm_head.weight"] - before).abs().max() < 1e-6


def test_a_map_of_heads_begins_near_the_mean_over_the_teachers() -> None:
    adapters = Adapters(TeacherShape(heads=16, width=4), (0,), heads=2, width=4)

    weight = adapters.attention["0"].weight

    assert (weight * 16 - 1).abs().max() < 0.6  # 6 standard deviations
