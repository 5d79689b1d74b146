"""Scales for encodings of few bits: by least squares on the decoded values, not by range alone.

A range scale gives the extremes of a row or channel a code of their own; with 6 or 4 bits it pays
to let an extreme be off by a little more, so that all steps get smaller. A scale is taken only
where its squared error is smaller than the range scale's and no value is off by more than one step
of the range scale. `cache_specs/encodings/` has that bound; a reader needs none of this.

What is chosen for a row or channel depends on nothing beside it: all steps are elementwise, sums
included.

Axes: V vision token, C channel, K values of a row.
"""

import torch
from jaxtyping import Float
from torch import Tensor

ALTERNATIONS = 4
"Least-squares fits of a channel. The fifth lowers the error by less than 1 %."

SEARCH = (-3, -2, -1, 1, 2, 3, 4, 5)
"""Scales tried for a row, in thirds of what moves its largest value by one code. -3 cuts it off by
one step of the range scale, which is the bound; the others may put it onto a code."""


def bfloat16_above(values: Float[Tensor, "*a"]) -> Float[Tensor, "*a"]:
    """The nearest bfloat16 that is not smaller."""
    rounded = ((values.contiguous().view(torch.int32) + 0xFFFF) >> 16) << 16
    return rounded.view(torch.float32)


def nearest_codes(
    values: Float[Tensor, "*a"], scale: Float[Tensor, "*#a"], levels: int
) -> Float[Tensor, "*a"]:
    """Nearest multiple of the scale, 0 to `levels`; 0 where the scale is 0 (all values equal)."""
    return (values / torch.where(scale > 0, scale, torch.inf)).round_().clamp_(0, levels)


def fit_roots(
    values: Float[Tensor, "*a K"], roots: Float[Tensor, "*a K"], scale: Float[Tensor, "*a"],
    levels: int,
) -> Float[Tensor, "*a"]:  # fmt: skip
    """Per row the scale, of `SEARCH` around the range scale, whose squares are closest to `values`.

    What counts is the error of the values: that of the roots would favour the many small ones.
    """
    largest = values.amax(dim=-1)
    best, least = scale, _root_error(values, roots, scale, largest, levels)
    for thirds in SEARCH:
        tried = bfloat16_above(scale * (1 + thirds / (3 * levels)))
        error = _root_error(values, roots, tried, largest, levels)
        better = error < least  # false for NaN, which an all-zero row gives
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best


def fit_channels(
    values: Float[Tensor, "*a V C"], scale: Float[Tensor, "*a C"], low: Float[Tensor, "*a C"],
    levels: int,
) -> tuple[Float[Tensor, "*a C"], Float[Tensor, "*a C"]]:  # fmt: skip
    """Per channel scale and low, from those of its range, by Lloyd-Max with equal steps.

    Codes for given scale and low, then least squares for given codes, and again; the best of all.
    """
    step, lowest, highest = scale, low, values.amax(dim=-2)
    codes, errors = _coded(values, scale, low, step, levels)
    best_scale, best_low, least = scale, low, fixed_sum(errors.square(), dim=-2)
    for _ in range(ALTERNATIONS):
        scale, low = _least_squares(codes, errors, scale, low, step)
        codes, errors = _coded(values, scale, low, step, levels)
        error = fixed_sum(errors.square(), dim=-2)
        better = error < least  # false for NaN, which a constant channel gives
        better &= (low - lowest <= step) & (highest - (low + levels * scale) <= step)
        better &= (scale > 0) & (scale <= 2 * step)  # a value between the ends is off by half
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_low = torch.where(better, low, best_low)
    return best_scale, best_low


def fixed_sum(values: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    """Sum by halves, in place: `values` are lost.

    `Tensor.sum` adds in an order that depends on the shape, so on what else is in the batch.
    """
    while (number := values.shape[dim]) > 1:
        half, rest = number // 2, (number + 1) // 2
        values.narrow(dim, 0, half).add_(values.narrow(dim, rest, half))
        values = values.narrow(dim, 0, rest)
    return values.squeeze(dim).clone()  # a view would keep all of it


def _root_error(
    values: Tensor, roots: Tensor, scale: Tensor, largest: Tensor, levels: int
) -> Tensor:
    """Sum of squares over a row, as shares of its largest value so that none underflows."""
    decoded = nearest_codes(roots, scale[..., None], levels).mul_(scale[..., None])
    decoded.mul_(decoded).sub_(values).div_(largest[..., None])
    return fixed_sum(decoded.mul_(decoded), dim=-1)


def _coded(
    values: Tensor, scale: Tensor, low: Tensor, step: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """Codes, and how far each value is above what its code decodes to."""
    codes = nearest_codes(values - low[..., None, :], scale[..., None, :], levels)
    decoded = (codes * scale[..., None, :]).add_(low[..., None, :])
    # In steps of the range scale, so that no square overflows or underflows.
    return codes, decoded.sub_(values).div_(-step[..., None, :])


def _least_squares(
    codes: Tensor, errors: Tensor, scale: Tensor, low: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """The line over the codes that is closest to the values. Takes `codes` and `errors` apart."""
    number = codes.shape[-2]
    code, error = (fixed_sum(part.clone(), dim=-2) / number for part in (codes, errors))
    centred = codes.sub_(code[..., None, :])
    covariance = fixed_sum(errors.mul_(centred), dim=-2)
    slope = covariance / fixed_sum(centred.square_(), dim=-2)
    fitted = (scale + slope * step).bfloat16().float()
    return fitted, low + (error * step - (fitted - scale) * code)
