"""How float values are stored in a cache, chosen per signal by the spec: names, sizes, decoding.

An encoding maps one float32 array to one or more stored arrays and back. The stored arrays are
named by suffix: `""` is the array itself, `__scale` (say) a sibling beside it. Every index of the
first axis is encoded on its own, so encoded pieces can be joined and cut along that axis.

The pages in `cache_specs/encodings/` say what is stored and how far off it may be. This module
decodes with numpy and is the reference; `shared.tensor_encodings` encodes, and decodes to the same
bits on any torch device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
    "Of one value; below 8 several codes are packed into a byte or three."

    @property
    def levels(self) -> int:
        """Largest code: codes are 0 to `levels`."""
        return (1 << self.bits) - 1

    @property
    def packed(self) -> bool:
        """Whether codes are packed along the last axis; see `cache_specs/encodings/README.md`."""
        return self.bits < 8

    @property
    def fitted(self) -> bool:
        """Whether the writer fits scales to the values (`shared.scales`). With 8 bits it takes the
        range scale: what that loses is too little for a student to notice.
        """
        return self.bits < 8

    @property
    def steps_off(self) -> float:
        """Largest error, in steps of the range scale (of roots in `sqrt` and `logprob`)."""
        return 1.0 if self.fitted else 0.5

    @property
    def zstd_level(self) -> int:
        """Of the lossless stage, for codes and siblings. Codes of 8 and 6 bits have nearly nothing
        left to squeeze: a negative level leaves them as they are, which reads four times as fast
        for 5 % more bytes.
        """
        return -1 if self.bits in (6, 8) else 3

    @property
    def siblings(self) -> tuple[str, ...]:
        """Suffixes of the arrays beside the codes."""
        return {"float": (), "channel": ("__scale", "__low")}.get(self.family, ("__scale",))

    def axes(self, suffix: str, axes: Sequence[str]) -> tuple[str, ...]:
        """Axis words of one stored array, from those of the values."""
        match suffix, self.family:
            case "", _:
                return (*axes[:-1], f"{axes[-1]}_packed") if self.packed else tuple(axes)
            case _, "channel":  # one per channel: the axis before it (vision) is gone
                return (*axes[:-2], axes[-1])
            case _:
                return tuple(axes[:-1])

    def stored(self, suffix: str, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """Type and shape of one stored array, from the shape of the values."""
        match suffix, self.family:
            case "", "float":
                return f"float{self.bits}", tuple(shape)
            case "", _:
                return "uint8", (*shape[:-1], shape[-1] * self.bits // 8)
            case _, "channel":
                return ("float32" if suffix == "__low" else "uint16"), (*shape[:-2], shape[-1])
            case _:
                return "uint16", tuple(shape[:-1])

    def size(self, shape: Sequence[int]) -> float:
        """Bytes for values of this shape, siblings included, before lossless compression."""
        arrays = [self.stored(suffix, shape) for suffix in ("", *self.siblings)]
        return float(sum(math.prod(row) * np.dtype(dtype).itemsize for dtype, row in arrays))


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
    values = _UNPACK[encoding.bits](codes).astype(np.float32)
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


def _unpack4(packed: Array) -> Array:
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _unpack6(packed: Array) -> Array:
    one, two, three = np.split(packed, 3, axis=-1)
    four = (one >> 6) | (two >> 6) << 2 | (three >> 6) << 4
    return np.concatenate([one & 63, two & 63, three & 63, four], axis=-1)


_UNPACK: dict[int, Callable[[Array], Array]] = {8: lambda codes: codes, 6: _unpack6, 4: _unpack4}
