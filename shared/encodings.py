"""How float values are stored in a cache, chosen per signal by the spec: names, sizes, decoding.

An encoding maps one float32 array to one or more stored arrays and back. The stored arrays are
named by suffix: `""` is the array itself, `__scale` (say) a sibling beside it. Every index of the
first axis is encoded on its own, so encoded pieces can be joined and cut along that axis.

The pages in `cache_specs/encodings/` say what is stored and how far off it may be. This module
decodes with numpy and is the reference; `shared.tensor_encodings` encodes, and decodes to the same
bits on any torch device.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Parts = Mapping[str, Array]
"Stored arrays by suffix."

AttentionEncoding = Literal["float32", "float16", "sqrt8", "sqrt6", "sqrt4"]
VisionEncoding = Literal["float32", "float16", "channel8", "channel6", "channel4"]
LogprobEncoding = Literal["float32", "float16", "logprob8"]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What is stored for one value, and beside it."""

    family: Literal["float", "sqrt", "logprob", "channel"]
    "`float`: as it is; `sqrt`: root, scale per row; `logprob`: `sqrt` of -x; `channel`: affine."
    bits: int
    "Of one value. Below 8: what it costs once compressed (6), or packed two to a byte (4)."

    @property
    def levels(self) -> int:
        """Largest code: codes are 0 to `levels`."""
        return (1 << self.bits) - 1

    @property
    def packed(self) -> bool:
        """Whether a byte holds two codes: j in its low half, j + n/2 in its high half."""
        return self.bits == 4

    @property
    def siblings(self) -> tuple[str, ...]:
        """Suffixes of the arrays beside the codes."""
        return {"float": (), "channel": ("__scale", "__low")}.get(self.family, ("__scale",))

    def axes(self, suffix: str, axes: Sequence[str]) -> tuple[str, ...]:
        """Axis words of one stored array, from those of the values."""
        match suffix, self.family:
            case "", _:
                return (*axes[:-1], f"{axes[-1]}_pair") if self.packed else tuple(axes)
            case _, "channel":  # one per channel: the axis before it (vision) is gone
                return (*axes[:-2], axes[-1])
            case _:
                return tuple(axes[:-1])

    def size(self, shape: Sequence[int]) -> float:
        """Bytes for values of this shape, siblings included, before lossless compression."""
        codes = math.prod(shape) * self.bits / 8
        match self.family:
            case "float":
                return codes
            case "channel":
                return codes + 6 * math.prod(shape[:-2]) * shape[-1]
            case _:
                return codes + 2 * math.prod(shape[:-1])


ENCODINGS: dict[str, Encoding] = {
    "float32": Encoding(family="float", bits=32),
    "float16": Encoding(family="float", bits=16),
    "sqrt8": Encoding(family="sqrt", bits=8),
    "sqrt6": Encoding(family="sqrt", bits=6),
    "sqrt4": Encoding(family="sqrt", bits=4),
    "logprob8": Encoding(family="logprob", bits=8),
    "channel8": Encoding(family="channel", bits=8),
    "channel6": Encoding(family="channel", bits=6),
    "channel4": Encoding(family="channel", bits=4),
}


def decode(name: str, parts: Parts) -> npt.NDArray[np.float32]:
    """The float32 array that `parts` stand for, in new memory where it is not stored as such."""
    encoding, codes = ENCODINGS[name], parts[""]
    if encoding.family == "float":
        return codes.astype(np.float32, copy=False)
    values = _unpack(codes) if encoding.packed else codes.astype(np.float32)
    scale = bfloat16_values(parts["__scale"])
    if encoding.family == "channel":
        values *= scale[..., None, :]
        values += np.asarray(parts["__low"], dtype=np.float32)[..., None, :]
        return values
    values *= scale[..., None]
    values *= values
    return np.negative(values, out=values) if encoding.family == "logprob" else values


def bfloat16_values(bits: Array) -> npt.NDArray[np.float32]:
    """bfloat16 numbers, which neither numpy nor Zarr has, from their bits in uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def id_dtype(vocabulary: int) -> type[np.unsignedinteger]:
    """The smallest unsigned integer that holds every token id of a vocabulary."""
    return next(t for t in (np.uint8, np.uint16, np.uint32) if vocabulary - 1 <= np.iinfo(t).max)


def _unpack(packed: Array) -> npt.NDArray[np.float32]:
    half = packed.shape[-1]
    values = np.empty((*packed.shape[:-1], 2 * half), dtype=np.float32)
    values[..., :half] = packed & 15
    values[..., half:] = packed >> 4
    return values
