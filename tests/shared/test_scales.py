"""Fitted scales: never worse than those of the range, and the same whatever else is encoded."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from shared.encodings import ENCODINGS
from shared.scales import bfloat16_above, fixed_sum, nearest_codes
from shared.tensor_encodings import decode, encode

ROOTS, CHANNELS = ["sqrt6", "sqrt4"], ["channel6", "channel4"]
MANTISSA = st.integers(-999, 999).map(lambda number: number / 999)
"Mixed with powers of ten: heavy tails, which the range scale is worst at."
POWER = st.sampled_from([0.0, 1e-42, 1e-20, 1e-3, 0.1, 1.0, 1e4, 1e18])


def heavy_tails(shape: tuple[int, ...]) -> st.SearchStrategy[Tensor]:
    """Channels and rows of any magnitude, single values far out."""
    mantissa = arrays.arrays(np.float64, shape, elements=MANTISSA)
    tail = arrays.arrays(np.float64, shape, elements=st.sampled_from([0.01, 0.1, 1.0, 3.0]))
    column = arrays.arrays(np.float64, shape[-1:], elements=POWER)
    drawn = st.tuples(mantissa, tail, column).map(lambda parts: parts[0] * parts[1] * parts[2])
    return drawn.map(lambda values: torch.from_numpy(values.astype(np.float32)))


def squared_error(decoded: Tensor, exact: Tensor, dim: int) -> npt.NDArray[np.float64]:
    return (decoded.double() - exact.double()).square().sum(dim).numpy()


@pytest.mark.parametrize("name", CHANNELS)
@given(values=heavy_tails((2, 9, 4)))
def test_a_fitted_channel_is_never_further_off_than_that_of_its_range(
    name: str, values: Tensor
) -> None:
    levels = ENCODINGS[name].levels
    low, high = values.aminmax(dim=-2, keepdim=True)
    scale = bfloat16_above((high - low) / levels)
    by_range = nearest_codes(values - low, scale, levels) * scale + low

    found = squared_error(decode(name, encode(name, values)), values, -2)

    # Rounding of the sums, beside which an error may vanish.
    slack = (1e-9 * (high - low).double()).square().squeeze(-2).numpy()
    assert (found <= squared_error(by_range, values, -2) * (1 + 1e-5) + slack).all()


@pytest.mark.parametrize("name", ROOTS)
@given(values=heavy_tails((2, 3, 12)))
def test_a_fitted_row_is_never_further_off_than_that_of_its_range(
    name: str, values: Tensor
) -> None:
    values, levels = values.abs(), ENCODINGS[name].levels
    roots, largest = values.sqrt(), values.amax(dim=-1)
    scale = bfloat16_above(roots.amax(dim=-1, keepdim=True) / levels)
    by_range = (nearest_codes(roots, scale, levels) * scale).square()

    found = squared_error(decode(name, encode(name, values)), values, -1)

    slack = (1e-9 * largest.double()).square().numpy()
    assert (found <= squared_error(by_range, values, -1) * (1 + 1e-5) + slack).all()


@pytest.mark.parametrize("name", [*ROOTS, *CHANNELS])
@pytest.mark.parametrize("width", [8, 20, 144])
def test_stored_bytes_do_not_depend_on_what_is_encoded_beside(name: str, width: int) -> None:
    chance = torch.Generator().manual_seed(width)
    values = torch.randn(8, 13, width, generator=chance).abs() ** 3
    each = [stored_bytes(encode(name, values[n : n + 1])) for n in range(8)]

    for batch in (3, 5, 8):
        for start in range(9 - batch):
            found = encode(name, values[start : start + batch])
            pieces = [{s: part[n : n + 1] for s, part in found.items()} for n in range(batch)]
            assert [stored_bytes(piece) for piece in pieces] == each[start : start + batch]


@pytest.mark.parametrize("name", [*ROOTS, *CHANNELS])
def test_stored_bytes_do_not_depend_on_the_number_of_threads(name: str) -> None:
    values = torch.randn(3, 144, 512, generator=torch.Generator().manual_seed(0)).abs() ** 3
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(stored_bytes(encode(name, values)))
    finally:
        torch.set_num_threads(threads)

    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("number", [1, 2, 3, 7, 144])
@pytest.mark.parametrize("dim", [-2, -1])
def test_the_sum_by_halves_is_the_sum(number: int, dim: int) -> None:
    shape = (2, number, 3) if dim == -2 else (2, 3, number)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = values.double().sum(dim)

    assert torch.allclose(fixed_sum(values, dim=dim).double(), wanted, atol=1e-5, rtol=0)


def stored_bytes(parts: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {suffix: stored.numpy().tobytes() for suffix, stored in parts.items()}
