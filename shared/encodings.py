"""How float values are stored in a cache, chosen per array by the spec.

An encoding maps one float32 array to one or more stored arrays and back. The stored arrays are
named by suffix: `""` is the array itself, `__scale` (say) a sibling beside it. Rows of the first
axis are encoded each on its own, so encoded pieces can be joined and cut along that axis.
Non-finite input is always refused: a cache never holds NaN or infinity.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Parts = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """A pair of functions between float32 and what is stored."""

    encode: Callable[[npt.NDArray[np.float32]], dict[str, npt.NDArray[np.generic]]]
    "float32 array -> stored arrays by suffix."
    decode: Callable[[Parts], npt.NDArray[np.float32]]
    "Stored arrays by suffix -> float32 array."
    bytes_per_value: float
    "Stored bytes per value before compression; what estimates use."


def encode(name: str, values: npt.NDArray[np.floating]) -> dict[str, npt.NDArray[np.generic]]:
    """Stored arrays of `values` under the encoding `name`.

    Raises:
        ValueError: a value is NaN, infinite, or outside what the encoding can hold.
    """
    exact = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(exact).all():
        raise ValueError("holds NaN or infinity")
    return ENCODINGS[name].encode(exact)


def decode(name: str, parts: Parts) -> npt.NDArray[np.float32]:
    """The float32 array that `parts` stand for."""
    return ENCODINGS[name].decode(parts)


def _to_half(values: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.generic]]:
    limit = float(np.finfo(np.float16).max)
    largest = float(np.abs(values).max(initial=0.0))
    if largest > limit:
        raise ValueError(f"holds {largest:g}, beyond float16's largest value {limit:g}")
    return {"": values.astype(np.float16)}


ENCODINGS: dict[str, Encoding] = {
    "float32": Encoding(
        encode=lambda values: {"": values},
        decode=lambda parts: parts[""].astype(np.float32, copy=False),
        bytes_per_value=4.0,
    ),
    "float16": Encoding(
        encode=_to_half,
        decode=lambda parts: parts[""].astype(np.float32),
        bytes_per_value=2.0,
    ),
}
