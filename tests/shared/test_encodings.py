"""Encodings: round trips within the documented bounds, the same bits from numpy and torch, golden
bytes, and never NaN or infinity in a cache.
"""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared import encodings, tensor_encodings
from shared.encodings import ENCODINGS, Parts, bfloat16_values, id_dtype

HALF_MAX = 65504.0
GOLDEN = Path(__file__).with_name("golden_encodings.json")
ROOTS = ["sqrt8", "sqrt6", "sqrt4"]
CHANNELS = ["channel8", "channel6", "channel4"]
TINY = float(np.finfo(np.float32).tiny)

Values = npt.NDArray[np.float32]


def encode(name: str, values: Values) -> dict[str, npt.NDArray[np.generic]]:
    found = tensor_encodings.encode(name, torch.from_numpy(values))
    return {suffix: stored.numpy() for suffix, stored in found.items()}


def decode(name: str, parts: Parts) -> Values:
    """Decoded by numpy, after torch was seen to give the same bits."""
    found = encodings.decode(name, parts)
    tensors = {suffix: torch.from_numpy(stored) for suffix, stored in parts.items()}
    assert found.tobytes() == tensor_encodings.decode(name, tensors).numpy().tobytes()
    return found


def values(low: float, high: float, shape: tuple[int, ...]) -> st.SearchStrategy[Values]:
    """Arrays in which some rows or channels are large, tiny, denormal or all zero."""
    elements = st.floats(low, high, width=32)
    factors = st.sampled_from([0.0, 1e-42, 1e-30, 1e-3, 1.0])
    columns = arrays.arrays(np.float32, shape[-1:], elements=factors)
    rows = arrays.arrays(np.float32, (*shape[:-1], 1), elements=factors)
    flat = arrays.arrays(np.float32, shape, elements=elements)
    return st.tuples(flat, rows, columns).map(lambda drawn: drawn[0] * drawn[1] * drawn[2])


@given(
    arrays.arrays(
        np.float32, (3, 2, 4), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_float32_gives_back_the_same_bits(given_: Values) -> None:
    found = decode("float32", encode("float32", given_))

    assert found.dtype == np.float32
    assert found.tobytes() == given_.tobytes()


@given(values(-HALF_MAX, HALF_MAX, (2, 3, 4)))
def test_float16_is_within_half_a_unit_in_the_last_place(given_: Values) -> None:
    parts = encode("float16", given_)
    found = decode("float16", parts)

    assert parts[""].dtype == np.float16
    bound = np.maximum(np.abs(given_) * 2.0**-11, 2.0**-25)
    assert (np.abs(found - given_) <= bound).all()


@pytest.mark.parametrize("name", ROOTS)
@given(given_=values(0, 1, (2, 3, 8)))
def test_roots_are_within_half_a_step(name: str, given_: Values) -> None:
    assert_roots_within_bound(name, given_, decode(name, encode(name, given_)))


@given(given_=values(-90, 0, (4, 6)))
def test_log_probabilities_are_within_half_a_step_of_the_root(given_: Values) -> None:
    found = decode("logprob8", encode("logprob8", given_))

    assert (found <= 0).all()
    assert_roots_within_bound("logprob8", -given_, -found)


def assert_roots_within_bound(name: str, given_: Values, found: Values) -> None:
    """`s sqrt(x) + s^2 / 4` with the step s, as cache_specs/encodings/sqrt.md says."""
    exact = given_.astype(np.float64)
    largest = np.sqrt(exact.max(axis=-1, keepdims=True))
    step = largest / ENCODINGS[name].levels * (1 + 2**-7)
    bound = step * np.sqrt(exact) + step**2 / 4
    assert (np.abs(found - exact) <= bound * (1 + 1e-4) + 1e-6 * exact + TINY).all()


@pytest.mark.parametrize("name", CHANNELS)
@given(given_=values(-1e4, 1e4, (2, 5, 4)))
def test_channels_are_within_half_a_step(name: str, given_: Values) -> None:
    found = decode(name, encode(name, given_))

    exact = given_.astype(np.float64)
    step = np.ptp(exact, axis=1, keepdims=True) / ENCODINGS[name].levels * (1 + 2**-7)
    slack = 2**-22 * np.abs(exact).max(axis=1, keepdims=True) + TINY
    assert (np.abs(found - exact) <= step / 2 + slack).all()


@pytest.mark.parametrize("name", CHANNELS)
def test_one_huge_channel_costs_the_others_nothing(name: str) -> None:
    plain = np.random.default_rng(0).normal(size=(1, 144, 8)).astype(np.float32)
    huge = plain.copy()
    huge[..., 3] = huge[..., 3] * 1e4 + 1e6

    kept = [0, 1, 2, 4, 5, 6, 7]
    found = decode(name, encode(name, huge))
    assert (found[..., kept] == decode(name, encode(name, plain))[..., kept]).all()
    assert np.abs(found[..., 3] - huge[..., 3]).max() < 0.04 * np.ptp(huge[..., 3])


@pytest.mark.parametrize("name", [*ROOTS, *CHANNELS])
def test_constant_rows_and_channels_come_back_exactly_where_they_can(name: str) -> None:
    zeros = np.zeros((2, 4, 8), dtype=np.float32)

    assert (decode(name, encode(name, zeros)) == 0).all()
    if name in CHANNELS:
        assert (decode(name, encode(name, zeros - 7.25)) == -7.25).all()


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    given_ = np.zeros((2, 4, 8), dtype=np.float32)
    given_[1, 1, 1] = bad

    with pytest.raises(ValueError, match="NaN or infinity"):
        encode(name, given_)


@pytest.mark.parametrize(
    ("name", "bad", "reason"),
    [
        ("float16", 65520.0, "beyond float16's largest value 65504"),
        ("channel8", -3e38, "beyond channel8's largest value 1e[+]38"),
        ("sqrt8", -1e-9, "not negative"),
        ("logprob8", 1e-9, "not positive"),
    ],
)
def test_what_an_encoding_cannot_hold_is_refused(name: str, bad: float, reason: str) -> None:
    given_ = np.zeros((1, 2, 4), dtype=np.float32)
    given_[0, 1, 3] = bad

    with pytest.raises(ValueError, match=reason):
        encode(name, given_)


@pytest.mark.parametrize("name", ["sqrt6", "sqrt4", "channel6", "channel4"])
def test_a_row_that_cannot_be_packed_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="has 5 values a row"):
        encode(name, np.zeros((1, 2, 5), dtype=np.float32))


@pytest.mark.parametrize("name", ENCODINGS)
def test_rows_are_encoded_each_on_its_own(name: str) -> None:
    given_ = _sample(name)
    whole = encode(name, given_)
    pieces = [encode(name, given_[:1]), encode(name, given_[1:])]

    for suffix, stored in whole.items():
        joined = np.concatenate([piece[suffix] for piece in pieces])
        assert joined.tobytes() == stored.tobytes()


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_array_that_is_not_contiguous_is_stored_in_its_own_order(name: str) -> None:
    turned = np.ascontiguousarray(_sample(name).swapaxes(0, 1)).swapaxes(0, 1)
    straight = encode(name, np.ascontiguousarray(turned))

    assert {s: v.tobytes() for s, v in encode(name, turned).items()} == {
        s: v.tobytes() for s, v in straight.items()
    }


@pytest.mark.parametrize("name", ENCODINGS)
def test_stored_arrays_have_the_named_siblings_axes_and_size(name: str) -> None:
    encoding, axes = ENCODINGS[name], ("query", "head", "vision")
    given_ = _sample(name)
    parts = encode(name, given_)

    assert set(parts) == {"", *encoding.siblings}
    for suffix, stored in parts.items():
        assert stored.ndim == len(encoding.axes(suffix, axes))
    assert sum(stored.nbytes for stored in parts.values()) == encoding.size(given_.shape)


@pytest.mark.parametrize("name", ENCODINGS)
def test_bytes_are_those_that_were_written_first(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    given_ = np.array(golden["values"], dtype=np.float32)
    parts = {
        suffix: np.frombuffer(bytes.fromhex(stored["hex"]), stored["dtype"])
        .reshape(stored["shape"])
        .copy()
        for suffix, stored in golden["parts"].items()
    }

    found = encode(name, given_)
    assert {s: v.tobytes() for s, v in found.items()} == {s: v.tobytes() for s, v in parts.items()}
    assert decode(name, parts).tobytes() == bytes.fromhex(golden["decoded"])


@given(st.integers(0, 2**16 - 1).filter(lambda bits: bits & 0x7F80 != 0x7F80))
def test_bfloat16_bits_are_read_as_torch_reads_them(bits: int) -> None:
    stored = np.array([bits], dtype=np.uint16)

    expected = torch.from_numpy(stored).view(torch.bfloat16).float().numpy()
    assert bfloat16_values(stored).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)],
)
def test_ids_take_the_smallest_type_that_holds_the_vocabulary(
    vocabulary: int, dtype: type[np.unsignedinteger]
) -> None:
    assert id_dtype(vocabulary) is dtype


def _sample(name: str) -> Values:
    chance = np.random.default_rng(7).normal(size=(3, 4, 8)).astype(np.float32)
    family = ENCODINGS[name].family
    return {"sqrt": np.abs(chance), "logprob": -np.abs(chance)}.get(family, chance)
