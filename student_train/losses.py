"""The Align-KD losses (Feng et al., CVPR 2025, arXiv:2412.01282, as `docs/method.md` states them).

Every function compares one student signal with one teacher signal. Means over a batch are not taken
here: a term is a *sum* over samples or response positions, and the training loop divides it by the
count of the whole global batch, so that the same batch gives the same loss and gradient however it
is split over micro-batches and processes.

Axes: N sample with an image, H student head, Q text row, V vision token, C student channel,
R response position, K cached top-k entry, J label, top-k entries and the rest: K + 2.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 1 << 22
"""Entries over the vocabulary that are worked on at once: 16 MiB in float32.

Memory of blocks of over 32 MiB goes back to the kernel at once (glibc's malloc) and is taken from
it anew, page by page, which costs many times the arithmetic.
"""


def cross_entropy(
    logits: Float[Tensor, "R vocab"], labels: Int[Tensor, " R"]
) -> Float[Tensor, " R"]:
    """L_sup: next-token cross entropy in nats, per response position."""
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def cross_entropy_and_topk_kl(
    logits: Float[Tensor, "R vocab"],
    labels: Int[Tensor, " R"],
    top_ids: Int[Tensor, "R K"],
    top_logprobs: Float[Tensor, "R K"],
    rest_logprobs: Float[Tensor, " R"] | None,
    direction: str,
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """L_sup as `cross_entropy` gives it, and L_rkl, both in nats, per response position.

    L_rkl is the KL between student and teacher at temperature 1. Outside the cached top k only the
    teacher's total mass is known, so the rest of the vocabulary is compared as one bucket. This is
    a lower bound of the full KL, exact when k is the vocabulary.

    Args:
        rest_logprobs: log of the teacher's mass outside the top k; None if k is its vocabulary:
            then the student's is compared among the same ids.
        direction: `reverse` is KL(student || teacher), the paper's; `forward` is
            KL(teacher || student).
    """
    logit_RJ = _Reduced.apply(logits, labels, top_ids)  # type: ignore[no-untyped-call]
    # Both losses are of differences; those of logits near zero round least.
    logit_RJ = logit_RJ - logit_RJ.detach().amax(dim=-1, keepdim=True)
    label, buckets = logit_RJ[:, 0], logit_RJ[:, 1:]
    total = buckets.logsumexp(dim=-1)
    student, teacher = buckets - total[:, None], top_logprobs.float()
    if rest_logprobs is None:  # of nothing, or of ids that only the student's vocabulary has
        student = buckets[:, :-1].log_softmax(dim=-1)
    else:
        teacher = torch.cat([teacher, rest_logprobs.float()[:, None]], dim=-1)
    if direction == "forward":
        student, teacher = teacher, student
    return total - label, (student.exp() * (student - teacher)).sum(dim=-1)


class _Reduced(torch.autograd.Function):
    """All that both losses need of the vocabulary, in float32: each position's logit of the label,
    its logits at `ids`, and the logsumexp of all others (minus infinity if there are none).

    What spans the vocabulary is the largest that a training step holds. Autograd's own steps to
    both losses make it over and over, in float32; this makes the gradient, in the logits' format,
    and nothing else beyond a block.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "R vocab"],
        labels: Int[Tensor, " R"],
        ids: Int[Tensor, "R K"],
    ) -> Float[Tensor, "R K_plus_2"]:
        others = torch.cat(
            [
                part.float().scatter(-1, known, float("-inf")).logsumexp(dim=-1, keepdim=True)
                for part, known in _blocks(logits, ids)
            ]
        )
        picked = torch.cat([labels[:, None], ids], dim=-1)
        ctx.save_for_backward(logits, picked, others)
        return torch.cat([logits.gather(-1, picked).float(), others], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "R K_plus_2"]) -> tuple[Tensor, None, None]:
        logits, picked, others = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for into, part, known, rest, slope in _blocks(grad_logits, logits, picked, others, grad):
            # Of the others: their softmax among themselves, times the slope of their logsumexp.
            block = (part.float() - rest).exp_().mul_(slope[:, -1:])
            block.scatter_(-1, known[:, 1:], 0)  # not among the others; may be infinite
            into.copy_(block.scatter_add_(-1, known, slope[:, :-1]))
        return grad_logits, None, None


def _blocks(logits: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same rows of all tensors, so many that the first has about BLOCK entries."""
    rows = max(1, BLOCK // logits.shape[1])
    return zip(*(torch.split(tensor, rows) for tensor in (logits, *others)), strict=True)


def attention_mse(
    student: Float[Tensor, "N H Q V"],
    teacher: Float[Tensor, "N H Q V"],
    row_mask: Bool[Tensor, "N Q"],
) -> Float[Tensor, " N"]:
    """L_attn: mean squared error of A_tv over a sample's heads, text rows and vision tokens.

    Args:
        teacher: through the adapter, so that it has the student's heads.
        row_mask: True for rows that are text; padded rows hold anything.
    """
    # where, not `*`, and before the square: padding may hold inf or NaN, and 0 * inf is NaN, in the
    # backward pass too.
    error_NHQV = torch.where(row_mask[:, None, :, None], student.float() - teacher.float(), 0)
    return error_NHQV.square().mean(dim=(1, 3)).sum(dim=1) / row_mask.sum(dim=1)


def vision_mse(
    student: Float[Tensor, "N V C"], teacher: Float[Tensor, "N V C"]
) -> Float[Tensor, "N V"]:
    """Squared error per vision token, averaged over channels; L_v_all is its mean over V.

    Args:
        teacher: through the adapter, so that it has the student's width.
    """
    return (student.float() - teacher.float()).square().mean(dim=2)


def focused_vision(
    attention: Float[Tensor, "N teacher_head Q V"], row_mask: Bool[Tensor, "N Q"], top: int
) -> Int[Tensor, "N top"]:
    """Indices of the vision tokens that each sample's text looks at most, over all heads.

    L_v_focus is the mean of `vision_mse` over these.
    """
    weight_NQV = torch.where(row_mask[:, :, None], attention.float().mean(dim=1), 0)
    return weight_NQV.sum(dim=1).topk(top, dim=-1).indices
