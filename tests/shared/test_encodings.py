"""Encodings: round trips within the documented bounds, the same bits from numpy and torch, golden
bytes, and never NaN or infinity in a cache.
"""

import json
from pathlib import Path
from typing import Any

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
FITTED = ["sqrt6", "sqrt4", "channel6", "channel4"]
STEPS_OFF = {name: 1 if name in FITTED else 0.5 for name in [*ROOTS, "logprob8", *CHANNELS]}
"Largest error in steps of the range scale, as the pages in cache_specs/encodings/ have it."
TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.nextafter(np.float32(tensor_encodings.LARGEST), np.float32(0)))

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
@given(given_=values(0, 1, (2, 3, 8)) | values(0, LARGEST, (2, 3, 8)))
def test_roots_are_within_the_documented_bound(name: str, given_: Values) -> None:
    assert_roots_within_bound(name, given_, decode(name, encode(name, given_)))


@given(given_=values(-90, 0, (4, 6)) | values(-LARGEST, 0, (4, 6)))
def test_log_probabilities_are_within_the_documented_bound(given_: Values) -> None:
    found = decode("logprob8", encode("logprob8", given_))

    assert (found <= 0).all()
    assert_roots_within_bound("logprob8", -given_, -found)


def assert_roots_within_bound(name: str, given_: Values, found: Values) -> None:
    """`2 e sqrt(x) + e^2` with the root's error e, as cache_specs/encodings/sqrt.md says."""
    exact = given_.astype(np.float64)
    largest = np.sqrt(exact.max(axis=-1, keepdims=True))
    off = STEPS_OFF[name] * largest / ENCODINGS[name].levels * (1 + 2**-7)
    bound = 2 * off * np.sqrt(exact) + off**2
    assert (np.abs(found - exact) <= bound * (1 + 1e-4) + 1e-6 * exact + TINY).all()


@pytest.mark.parametrize("name", CHANNELS)
@given(given_=values(-1e4, 1e4, (2, 5, 4)) | values(-LARGEST, LARGEST, (2, 5, 4)))
def test_channels_are_within_the_documented_bound(name: str, given_: Values) -> None:
    found = decode(name, encode(name, given_))

    exact = given_.astype(np.float64)
    step = np.ptp(exact, axis=1, keepdims=True) / ENCODINGS[name].levels * (1 + 2**-7)
    slack = 2**-22 * np.abs(exact).max(axis=1, keepdims=True) + TINY
    assert (np.abs(found - exact) <= STEPS_OFF[name] * step + slack).all()


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


@pytest.mark.parametrize("name", FITTED)
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

    assert _bytes(encode(name, turned)) == _bytes(encode(name, np.ascontiguousarray(turned)))


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
def test_stored_bytes_decode_to_what_they_first_did(name: str) -> None:
    golden = _golden(name)

    assert decode(name, golden["parts"]).tobytes() == bytes.fromhex(golden["decoded"])


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name not in FITTED])
def test_what_is_not_fitted_is_stored_as_it_first_was(name: str) -> None:
    golden = _golden(name)

    found = encode(name, np.array(golden["values"], dtype=np.float32))

    assert _bytes(found) == _bytes(golden["parts"])


LONG = 1 + 2**-9
"Steps of this size lie between two bfloat16 scales: 1 is the nearer, 1 + 2^-7 the range scale."


@pytest.mark.parametrize(
    ("name", "given_", "codes", "scale", "low"),
    [
        # Scale 1 with half of what is missing on either side. A constant channel stays.
        ("channel4", [[0, 7.25], [15 * LONG, 7.25]], "000f", ["3f80", "0000"], [15 / 1024, 7.25]),
        (
            "channel6", [[0, 0, 1, -63 * LONG], [63 * LONG, 0, 1, 0]], "000000ffc0c0",
            ["3f80", "0000", "0000", "3f80"], [63 / 1024, 0, 1, 63 / 1024 - 63 * LONG],
        ),
        # Roots 7.5 and 15 in 7 and 14 steps of 137/128: with 15 steps 7.5 would lie between two.
        ("sqrt4", [[56.25, 56.25, 56.25, 225]], "77e7", ["3f89"], None),
        ("sqrt6", [[0, 0, 0, (63 * LONG) ** 2]], "c0c0c0", ["3f80"], None),
        ("sqrt4", [[0, 0, 0, 0]], "0000", ["0000"], None),
    ],
)  # fmt: skip
def test_fitted_scales_are_those_worked_out_by_hand(
    name: str, given_: list[list[float]], codes: str, scale: list[str], low: list[float] | None
) -> None:
    found = encode(name, np.array([given_], dtype=np.float32))

    assert found[""].tobytes().hex() == codes
    assert [f"{bits:04x}" for bits in found["__scale"].flat] == scale
    if low is not None:
        assert found["__low"].ravel().tolist() == [float(np.float32(value)) for value in low]


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


def _golden(name: str) -> dict[str, Any]:
    """What the first writer of format 1 stored: `values`, `parts`, `decoded`."""
    golden: dict[str, Any] = json.loads(GOLDEN.read_text())[name]
    parts = {
        suffix: np.frombuffer(bytes.fromhex(stored["hex"]), stored["dtype"])
        .reshape(stored["shape"])
        .copy()
        for suffix, stored in golden["parts"].items()
    }
    return {**golden, "parts": parts}


def _bytes(parts: Parts) -> dict[str, bytes]:
    return {suffix: stored.tobytes() for suffix, stored in parts.items()}


@pytest.mark.parametrize("name", ["channel6", "channel4"])
def test_many_equal_values_do_not_push_a_lone_one_past_the_bound(name: str) -> None:
    levels = ENCODINGS[name].levels  # so a step of the range scale is 1
    channel = np.array([0.0, 4.6] * 1000 + [levels], dtype=np.float32)
    values = channel[None, :, None].repeat(4, axis=2)

    found = decode(name, encode(name, values))

    assert np.abs(found - values).max() <= 1 + 2**-7
