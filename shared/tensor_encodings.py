"""The encodings of `shared.encodings` in torch: encode where the teacher ran, decode where the
student trains. Decoding gives the bits that numpy gives: each step is one IEEE operation.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from shared.encodings import ENCODINGS, Encoding
from shared.scales import bfloat16_above, fit_channels, fit_roots, nearest_codes

LARGEST = 1e38
"Beyond it a decoded value could round to infinity."


def encode(name: str, values: Float[Tensor, "..."]) -> dict[str, Shaped[Tensor, "..."]]:
    """Stored arrays of `values` by suffix, on the same device.

    Raises:
        ValueError: a value is NaN, infinite, or outside what the encoding can hold.
    """
    encoding, exact = ENCODINGS[name], values.float()
    _check(name, exact)
    match encoding.family:
        case "float":
            return {"": exact.half() if encoding.bits == 16 else exact}
        case "channel":
            return _encode_channels(encoding, exact)
        case "logprob":
            return _encode_roots(encoding, -exact)
        case _:
            return _encode_roots(encoding, exact)


def decode(name: str, parts: Mapping[str, Shaped[Tensor, "..."]]) -> Float[Tensor, "..."]:
    """The float32 tensor that `parts` stand for."""
    encoding, codes = ENCODINGS[name], parts[""]
    if encoding.family == "float":
        return codes.float()
    values = _UNPACK[encoding.bits](codes)
    scale = parts["__scale"].view(torch.bfloat16).float()
    if encoding.family == "channel":
        return (values * scale[..., None, :]).add_(parts["__low"][..., None, :])
    roots = values * scale[..., None]
    squares = roots.mul_(roots)
    return squares.neg_() if encoding.family == "logprob" else squares


def _check(name: str, values: Tensor) -> None:
    encoding = ENCODINGS[name]
    if not values.numel():
        return
    low, high = torch.stack(values.aminmax()).tolist()  # one wait for the device, not two
    limit = float(torch.finfo(torch.float16).max) if encoding.bits == 16 else LARGEST
    if not (low > float("-inf") and high < float("inf")):  # NaN compares false
        raise ValueError("holds NaN or infinity")
    largest = max(-low, high)
    if encoding.bits < 32 and largest > limit:
        raise ValueError(f"holds {largest:g}, beyond {name}'s largest value {limit:g}")
    if encoding.family == "sqrt" and low < 0:
        raise ValueError(f"holds {low:g}, but attention weights are not negative")
    if encoding.family == "logprob" and high > 0:
        raise ValueError(f"holds {high:g}, but log-probabilities are not positive")


def _encode_roots(encoding: Encoding, values: Tensor) -> dict[str, Tensor]:
    roots = values.sqrt()
    scale = bfloat16_above(roots.amax(dim=-1) / encoding.levels)
    if encoding.fitted:
        scale = fit_roots(values, roots, scale, encoding.levels)
    codes = nearest_codes(roots, scale[..., None], encoding.levels).to(torch.uint8)
    return {"": _PACK[encoding.bits](codes), "__scale": _bits(scale)}


def _encode_channels(encoding: Encoding, values: Tensor) -> dict[str, Tensor]:
    low, high = values.aminmax(dim=-2)
    scale = bfloat16_above((high - low) / encoding.levels)
    if encoding.fitted:
        scale, low = fit_channels(values, scale, low, encoding.levels)
    offsets = values - low[..., None, :]
    codes = nearest_codes(offsets, scale[..., None, :], encoding.levels).to(torch.uint8)
    return {"": _PACK[encoding.bits](codes), "__scale": _bits(scale), "__low": low}


def _bits(scale: Tensor) -> Tensor:
    return (scale.contiguous().view(torch.int32) >> 16).to(torch.uint16)


def _pack4(codes: Tensor) -> Tensor:
    one, two = _parts(codes, 2)
    return one | (two << 4)


def _pack6(codes: Tensor) -> Tensor:
    *low, four = _parts(codes, 4)
    return torch.cat([part | ((four >> 2 * n & 3) << 6) for n, part in enumerate(low)], dim=-1)


def _parts(codes: Tensor, number: int) -> tuple[Tensor, ...]:
    if codes.shape[-1] % number:
        raise ValueError(f"has {codes.shape[-1]} values a row, which {number} does not divide")
    return codes.chunk(number, dim=-1)


def _unpack4(packed: Tensor) -> Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _unpack6(packed: Tensor) -> Tensor:
    one, two, three = packed.chunk(3, dim=-1)
    four = (one >> 6) | (two >> 6) << 2 | (three >> 6) << 4
    return torch.cat([one & 63, two & 63, three & 63, four], dim=-1)


_PACK: dict[int, Callable[[Tensor], Tensor]] = {8: lambda codes: codes, 6: _pack6, 4: _pack4}
_UNPACK: dict[int, Callable[[Tensor], Tensor]] = {8: lambda codes: codes, 6: _unpack6, 4: _unpack4}
