"""Each loss: hand values, mask == subset, zero at teacher == student, finite gradients."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from student_train import losses
from student_train.losses import (
    attention_mse,
    cross_entropy,
    cross_entropy_and_topk_kl,
    focused_vision,
    vision_mse,
)

DIRECTIONS = ("reverse", "forward")


def logits(seed: int, rows: int = 5, vocabulary: int = 23, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def cached(teacher: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a cache holds of the teacher's logits."""
    logprobs = teacher.log_softmax(-1)
    top, ids = logprobs.topk(k, dim=-1)
    if k == teacher.shape[-1]:
        return ids, top, None
    rest = logprobs.scatter(-1, ids, -math.inf).logsumexp(-1)
    return ids, top, rest


def topk_kl(
    student: Tensor, ids: Tensor, top: Tensor, rest: Tensor | None, direction: str
) -> Tensor:
    """The second of both losses; the labels do not matter to it."""
    labels = torch.zeros(len(student), dtype=torch.long)
    return cross_entropy_and_topk_kl(student, labels, ids, top, rest, direction)[1]


def full_kl(student: Tensor, teacher: Tensor, direction: str) -> Tensor:
    """The formula, over the whole vocabulary, in float64."""
    s, t = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    one, other = (s, t) if direction == "reverse" else (t, s)
    return (one.exp() * (one - other)).sum(-1)


def test_cross_entropy_has_its_hand_value() -> None:
    # Two equal logits: the probability is 1/2; and with ln 3 apart it is 3/4 or 1/4.
    found = cross_entropy(
        torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [math.log(3), 0.0]]), torch.tensor([0, 0, 1])
    )

    torch.testing.assert_close(found, torch.tensor([2.0, 4 / 3, 4.0]).log())


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        # student (1/2, 1/2), teacher (3/4, 1/4)
        ("reverse", 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)),
        ("forward", 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)),
    ],
)
def test_topk_kl_has_its_hand_value(direction: str, expected: float) -> None:
    ids, top, rest = cached(torch.tensor([[math.log(3), 0.0]]), 2)

    found = topk_kl(torch.zeros(1, 2), ids, top, rest, direction)

    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_topk_kl_compares_what_is_outside_the_top_as_one_bucket() -> None:
    teacher = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log()
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    ids, top, rest = cached(teacher, 1)

    reverse = 0.4 * math.log(0.4 / 0.7) + 0.6 * math.log(0.6 / 0.3)
    forward = 0.7 * math.log(0.7 / 0.4) + 0.3 * math.log(0.3 / 0.6)

    assert float(topk_kl(student, ids, top, rest, "reverse")) == pytest.approx(reverse, rel=1e-5)
    assert float(topk_kl(student, ids, top, rest, "forward")) == pytest.approx(forward, rel=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ids_that_only_the_student_has_are_not_compared_with_a_whole_vocabulary(
    direction: str,
) -> None:
    """Padding of its vocabulary: a KL may not be negative for it."""
    student, teacher = logits(0), logits(1)
    padded = torch.cat([student, student.new_full((len(student), 2), 3.0)], dim=-1)

    found = topk_kl(padded, *cached(teacher, 23), direction)

    torch.testing.assert_close(
        found.double(), full_kl(student, teacher, direction), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_topk_kl_is_the_full_kl_when_k_is_the_vocabulary(direction: str) -> None:
    student, teacher = logits(0), logits(1)

    found = topk_kl(student, *cached(teacher, 23), direction)

    torch.testing.assert_close(
        found.double(), full_kl(student, teacher, direction), rtol=1e-5, atol=0
    )


@hypothesis.given(
    seed=st.integers(0, 10**6), k=st.integers(1, 22), scale=st.floats(0.1, 8),
    direction=st.sampled_from(DIRECTIONS),
)  # fmt: skip
def test_topk_kl_is_between_zero_and_the_full_kl(
    seed: int, k: int, scale: float, direction: str
) -> None:
    student, teacher = logits(seed, scale=scale), logits(seed + 1, scale=scale)

    found = topk_kl(student, *cached(teacher, k), direction).double()

    slack = 1e-5 * (1 + scale)
    assert (found <= full_kl(student, teacher, direction) + slack).all()
    assert (found >= -slack).all()


@hypothesis.given(seed=st.integers(0, 10**6), k=st.integers(1, 21))
def test_topk_kl_grows_with_k(seed: int, k: int) -> None:
    student, teacher = logits(seed), logits(seed + 1)

    fewer, more = (topk_kl(student, *cached(teacher, n), "reverse") for n in (k, k + 1))

    assert (fewer <= more + 1e-5).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [1, 7, 23])
def test_topk_kl_is_zero_where_student_equals_teacher(direction: str, k: int) -> None:
    found = topk_kl(logits(3), *cached(logits(3), k), direction)

    torch.testing.assert_close(found, torch.zeros(5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [1, 7, 23])
def test_topk_kl_has_finite_gradients_even_for_a_certain_teacher(direction: str, k: int) -> None:
    teacher = logits(1, scale=60.0)  # nearly all mass on one token
    student = logits(0, scale=30.0).requires_grad_()

    topk_kl(student, *cached(teacher, k), direction).sum().backward()

    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0


def test_topk_kl_does_not_depend_on_the_order_of_the_top() -> None:
    ids, top, rest = cached(logits(1), 7)

    one = topk_kl(logits(0), ids, top, rest, "reverse")
    other = topk_kl(logits(0), ids.flip(-1), top.flip(-1), rest, "reverse")

    torch.testing.assert_close(one, other)


def step_by_step(
    student: Tensor, labels: Tensor, ids: Tensor, top: Tensor, rest: Tensor | None, direction: str
) -> tuple[Tensor, Tensor]:
    """Both losses as they are defined, with autograd's own derivatives, in float64."""
    logprobs = student.double().log_softmax(-1)
    one, other = logprobs.gather(-1, ids), top.double()
    if rest is not None:
        outside = logprobs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        one, other = torch.cat([one, outside], -1), torch.cat([other, rest.double()[:, None]], -1)
    if direction == "forward":
        one, other = other, one
    supervised = -logprobs.gather(-1, labels[:, None])[:, 0]
    return supervised, (one.exp() * (one - other)).sum(-1)


@hypothesis.given(
    seed=st.integers(0, 10**6), k=st.integers(1, 23), scale=st.floats(0.1, 40),
    direction=st.sampled_from(DIRECTIONS),
)  # fmt: skip
def test_both_losses_and_their_gradients_are_those_of_the_formulas(
    seed: int, k: int, scale: float, direction: str
) -> None:
    student, target = logits(seed, scale=scale), cached(logits(seed + 1, scale=scale), k)
    # Labels in the teacher's top and outside it.
    labels = torch.randint(23, (5,), generator=torch.Generator().manual_seed(seed))
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()

    found = cross_entropy_and_topk_kl(ours, labels, *target, direction)
    expected = step_by_step(theirs, labels, *target, direction)
    # Weights apart, so that no gradient can stand in for another.
    weights = torch.linspace(0.5, 1.5, 10).reshape(2, 5)
    (torch.stack(found) * weights).sum().backward()
    (torch.stack(expected) * weights).sum().backward()

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5 * (1 + scale))


def test_cross_entropy_is_the_same_with_and_without_a_teacher() -> None:
    student = logits(0, scale=30.0)
    labels = torch.tensor([3, 0, 22, 7, 7])
    alone, taught = student.clone().requires_grad_(), student.clone().requires_grad_()

    expected = cross_entropy(alone, labels)
    found, _ = cross_entropy_and_topk_kl(taught, labels, *cached(logits(1), 7), "reverse")
    expected.sum().backward()
    found.sum().backward()

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(taught.grad, alone.grad)


@pytest.mark.parametrize("rows", [1, 2, 5, 7])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    labels, target = torch.arange(5), cached(logits(1), 7)
    at_once = cross_entropy_and_topk_kl(logits(0), labels, *target, "reverse")

    monkeypatch.setattr(losses, "BLOCK", rows * 23)
    found = cross_entropy_and_topk_kl(logits(0), labels, *target, "reverse")

    torch.testing.assert_close(found, at_once, rtol=0, atol=0)


def test_losses_of_half_precision_logits_are_taken_in_float32() -> None:
    student = logits(0).half().requires_grad_()
    labels, target = torch.arange(5), cached(logits(1), 7)

    found = cross_entropy_and_topk_kl(student, labels, *target, "reverse")
    torch.stack(found).sum().backward()

    expected = cross_entropy_and_topk_kl(student.detach().float(), labels, *target, "reverse")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert student.grad is not None
    assert student.grad.dtype == torch.float16


def test_no_response_position_has_no_loss() -> None:
    student = logits(0)[:0].requires_grad_()
    ids, top, rest = cached(logits(1), 7)
    assert rest is not None

    found = cross_entropy_and_topk_kl(
        student, torch.arange(0), ids[:0], top[:0], rest[:0], "reverse"
    )
    torch.stack(found).sum().backward()

    assert [loss.shape for loss in found] == [(0,), (0,)]
    assert student.grad is not None


def test_attention_mse_has_its_hand_value() -> None:
    student = torch.zeros(1, 2, 2, 2)
    teacher = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]]])

    both = attention_mse(student, teacher, torch.tensor([[True, True]]))
    first = attention_mse(student, teacher, torch.tensor([[True, False]]))

    assert both.tolist() == [(1 + 9) / 8]
    assert first.tolist() == [1 / 4]


@pytest.mark.parametrize("padding", [math.nan, math.inf, 1e30])
def test_attention_mse_of_a_padded_batch_is_that_of_its_samples_alone(padding: float) -> None:
    student, teacher = torch.rand(3, 2, 5, 7), torch.rand(3, 2, 5, 7)
    rows = torch.tensor([5, 2, 1])
    mask = torch.arange(5) < rows[:, None]
    alone = torch.cat(
        [
            attention_mse(student[n : n + 1, :, :q], teacher[n : n + 1, :, :q], mask[n : n + 1, :q])
            for n, q in enumerate(rows.tolist())
        ]
    )
    hidden = ~mask[:, None, :, None]
    student = student.masked_fill(hidden, padding).requires_grad_()
    teacher = teacher.masked_fill(hidden, padding).requires_grad_()

    found = attention_mse(student, teacher, mask)
    found.sum().backward()

    torch.testing.assert_close(found, alone)
    for side in (student, teacher):
        assert side.grad is not None
        assert side.grad.isfinite().all()
        assert not side.grad.masked_select(hidden).any()


def test_attention_mse_is_zero_at_teacher_equals_student() -> None:
    same = torch.rand(2, 3, 4, 5)

    assert attention_mse(same, same, torch.ones(2, 4, dtype=torch.bool)).tolist() == [0, 0]


def test_vision_mse_has_its_hand_value_and_is_zero_at_equality() -> None:
    student = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])

    assert vision_mse(student, teacher).tolist() == [[2.0, 0.0]]
    assert vision_mse(student, student).tolist() == [[0.0, 0.0]]


def test_errors_of_half_precision_signals_are_taken_in_float32() -> None:
    student, teacher = torch.full((1, 1, 4), 300.0).half(), torch.zeros(1, 1, 4).half()

    assert vision_mse(student, teacher).tolist() == [[90_000.0]]  # beyond float16


def test_focused_vision_is_where_the_text_looks_at_most() -> None:
    attention = torch.zeros(2, 2, 3, 6)
    attention[0, 0, 0, 4] = 0.5
    attention[0, 1, 2, 1] = 0.4
    attention[0, :, 1, 2] = 0.1  # both heads: 0.1 on average
    attention[1, 0, 0, 0] = 0.3
    attention[1, 1, 0, 5] = 0.2
    attention[1, :, 0, 3] = 0.09
    everything = torch.ones(2, 3, dtype=torch.bool)

    found = focused_vision(attention, everything, 2)

    assert [sorted(row) for row in found.tolist()] == [[1, 4], [0, 5]]


def test_focused_vision_ignores_padded_rows() -> None:
    attention = torch.zeros(1, 1, 2, 4)
    attention[0, 0, 0, 3] = 0.1
    attention[0, 0, 1, 0] = math.nan

    found = focused_vision(attention, torch.tensor([[True, False]]), 1)

    assert found.tolist() == [[3]]


def test_cross_entropy_of_half_precision_logits_is_taken_in_float32() -> None:
    student, labels = logits(0).bfloat16(), torch.arange(5)

    found = cross_entropy(student, labels)

    torch.testing.assert_close(found, cross_entropy(student.float(), labels), rtol=0, atol=0)


def test_what_all_logits_share_costs_no_digits() -> None:
    """Losses are of differences; rounded sums of large logits would be off by 1e-4."""
    near, labels = logits(0).mul(2**10).round().div(2**10), torch.arange(5)
    ids, top, _ = cached(logits(1), 23)

    found = cross_entropy_and_topk_kl(near + 1024, labels, ids, top, None, "reverse")

    expected = cross_entropy_and_topk_kl(near, labels, ids, top, None, "reverse")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
