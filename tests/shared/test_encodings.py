"""Encodings: round trips within their bounds, and never NaN or infinity in a cache."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared.encodings import ENCODINGS, decode, encode

HALF_MAX = 65504.0


def values(limit: float) -> st.SearchStrategy[npt.NDArray[np.float32]]:
    return arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5),
        elements=st.floats(-limit, limit, width=32),
    )


@given(values(float(np.finfo(np.float32).max)))
def test_float32_gives_back_the_same_bits(given_: npt.NDArray[np.float32]) -> None:
    found = decode("float32", encode("float32", given_))

    assert found.dtype == np.float32
    assert found.tobytes() == given_.tobytes()


@given(values(HALF_MAX))
def test_float16_is_within_half_a_unit_in_the_last_place(
    given_: npt.NDArray[np.float32],
) -> None:
    parts = encode("float16", given_)
    found = decode("float16", parts)

    assert parts[""].dtype == np.float16
    bound = np.maximum(np.abs(given_) * 2.0**-11, 2.0**-25)
    assert (np.abs(found - given_) <= bound).all()


@pytest.mark.parametrize("name", ENCODINGS)
@given(st.data())
def test_rows_are_encoded_each_on_its_own(name: str, data: st.DataObject) -> None:
    whole = data.draw(
        arrays.arrays(np.float32, (6, 2, 3), elements=st.floats(-1000, 1000, width=32))
    )
    cut = data.draw(st.integers(0, 6))
    joined = encode(name, whole)
    pieces = [encode(name, piece) for piece in (whole[:cut], whole[cut:])]

    for suffix, part in joined.items():
        np.testing.assert_array_equal(part, np.concatenate([piece[suffix] for piece in pieces]))
        rows = {key: value[cut:] for key, value in joined.items()}
    np.testing.assert_array_equal(decode(name, rows), decode(name, joined)[cut:])


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        encode(name, np.array([[0.0, bad]], dtype=np.float32))


@pytest.mark.parametrize("value", [65520.0, -70000.0, 1e30])
def test_float16_refuses_what_it_would_turn_into_infinity(value: float) -> None:
    with pytest.raises(ValueError, match="beyond float16's largest value 65504"):
        encode("float16", np.array([value], dtype=np.float32))


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_size_that_estimates_use_is_the_real_one(name: str) -> None:
    parts = encode(name, np.ones((7, 11), dtype=np.float32))

    assert sum(part.nbytes for part in parts.values()) == 77 * ENCODINGS[name].bytes_per_value


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_array_that_is_not_contiguous_is_stored_in_its_own_order(name: str) -> None:
    given_ = np.arange(24, dtype=np.float32).reshape(2, 3, 4).swapaxes(0, 1)

    np.testing.assert_array_equal(decode(name, encode(name, given_)), given_)
