"""What the encodings cost and lose on a real model's statistics: `make bench-encodings`.

Bytes are files on disk of a cache that the project's own writer wrote, with nothing shared between
samples. 1 is the same content in float16 (ids in int32), uncompressed.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.signals import Signals, real_signals
from benchmarks.synthetic_cache import write_cache
from shared.record import read_records, sizes_by_array
from shared.spec import CacheSpec
from shared.tensor_encodings import decode, encode

SAMPLES = 24
SPECS = Path(__file__).parents[1] / "cache_specs"
ENCODINGS_OF = {
    "attention": ("float16", "sqrt8", "sqrt6", "sqrt4"),
    "vision_tokens": ("float16", "channel8", "channel6", "channel4"),
    "logprobs": ("float16", "logprob8"),
}


def main() -> None:
    """Print both tables."""
    signals = real_signals(SAMPLES)
    print(f"{SAMPLES} samples, 7B shapes, 128 text rows, 64 response positions with k = 64\n")
    print("| signal | encoding | bits a value on disk | of float16 | relative L2 error |")
    print("|---|---|---|---|---|")
    for signal, names in ENCODINGS_OF.items():
        for name in names:
            print(_row(signal, name, signals))
    print("\n| spec | bytes a sample | of float16 |")
    print("|---|---|---|")
    for file in ("align-kd", "default", "small"):
        spec = CacheSpec.load(SPECS / f"{file}.yaml")
        each = sum(_sizes(spec, signals).values()) / SAMPLES
        print(f"| {file} | {each:,.0f} | {each / signals[0].float16_bytes:.3f} |")


def _row(signal: str, name: str, signals: Sequence[Signals]) -> str:
    values = [_values(signal, sample) for sample in signals]
    numbers = sum(value.numel() for value in values)
    sizes = _sizes(_spec(signal, name), signals)
    prefix = {"attention": "attention_0", "logprobs": "top_logprobs"}.get(signal, signal)
    size = sum(bytes_ for array, bytes_ in sizes.items() if array.startswith(prefix))
    wrong = torch.stack([(decode(name, encode(name, v)) - v).square().sum() for v in values]).sum()
    all_ = torch.stack([v.square().sum() for v in values]).sum()
    error = float((wrong / all_).sqrt())
    bits = 8 * size / numbers
    return f"| {signal} | {name} | {bits:.2f} | {bits / 16:.3f} | {error:.1e} |"


def _values(signal: str, sample: Signals) -> Tensor:
    if signal == "attention":
        return sample.attention
    return sample.vision_tokens[None] if signal == "vision_tokens" else sample.top_logprobs


def _spec(signal: str, name: str) -> CacheSpec:
    more = {"attention": {"layers": [0]}, "logprobs": {"top_k": 64}}.get(signal, {})
    return CacheSpec.from_dict(
        {"template": "v1", "image_aspect": "pad", signal: {"encoding": name, **more}}
    )


def _sizes(spec: CacheSpec, signals: Sequence[Signals]) -> dict[str, int]:
    """Bytes on disk by array, metadata and indexes included."""
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), spec, signals, samples=len(signals), shards=1)
        return sizes_by_array(list(read_records(Path(folder)).values()))


if __name__ == "__main__":
    main()
