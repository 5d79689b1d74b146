"""What the probe costs, and how much a teacher's values move with the batch: one table.

python -m benchmarks.probe
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from cache_builder.features import compute_features
from cache_builder.recompute import NOISE, load_for, prepare_input
from shared.cache import Cache, open_cache
from shared.images import ImageProcessor
from shared.probe import read_probe
from shared.record import sizes_by_array
from shared.tokenizer import load_tokenizer
from student_train.probe import check_probe
from tests.student_train.support import SPEC, STUDENT, mixed_samples, recipe
from tests.support import (
    CLIP,
    TEACHER,
    annotation,
    build,
    encoded,
    picture,
    sample,
    text_sample,
    write_tar,
)

_SHARDS = 10


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [*cost(Path(folder)), *movements(Path(folder))]
    print("\n".join(f"{name:<66} {value:>12}" for name, value in rows))


def cost(folder: Path) -> list[tuple[str, str]]:
    """Of photographs of 640 x 480 pixels."""
    photo = encoded(picture(1, (640, 480)).resize((64, 48)).resize((640, 480)), "JPEG", quality=90)
    tars = [
        write_tar(
            folder / f"photo-{n}.tar",
            sample(f"i{n}", annotation(), photo, "jpg"),
            text_sample(f"t{n}"),
        )
        for n in range(_SHARDS)
    ]
    build(folder / "photos", tars, SPEC)
    cache = open_cache(folder / "photos")
    tokenizer, processor = load_tokenizer(STUDENT), ImageProcessor(CLIP, "pad")
    begin = time.monotonic()
    check_probe(cache, recipe(), tokenizer, processor, accept=(), accepted={})
    seconds = time.monotonic() - begin
    sizes = sizes_by_array(list(cache.records.values()))
    stored = sum(size for array, size in sizes.items() if array.startswith("probe_"))
    return [
        (
            "train-student's probe of 8 shards, 16 samples, 640 x 480 JPEG: seconds",
            f"{seconds:.2f}",
        ),
        ("probe's bytes on disk, a shard", f"{stored // _SHARDS}"),
        ("of them the image", f"{len(photo)}"),
    ]


def movements(folder: Path) -> list[tuple[str, str]]:
    """Batches of 6 against single samples, without encoding."""
    samples = mixed_samples(24)
    tars = [write_tar(folder / f"m-{n}.tar", *samples[6 * n : 6 * n + 6]) for n in range(4)]
    rows = []
    for dtype, allowed in NOISE.items():
        build(folder / dtype, tars, SPEC, dtype=dtype, batch_size=6)
        worst = largest_movement(open_cache(folder / dtype))
        name = f"{dtype}: largest move by batch size, share of the largest value"
        rows += [
            (name, f"{worst:.1e}"),
            (f"{dtype}: allowed by verify --teacher", f"{allowed:.0e}"),
        ]
    return rows


def largest_movement(cache: Cache) -> float:
    """Of any value of the probe, as a share of the largest of its array."""
    builder = load_for(cache, str(TEACHER), str(CLIP), "cpu")
    worst = 0.0
    for record in cache.records.values():
        for found in read_probe(cache.root, record):
            stored = cache.read(found.key)
            arrays = compute_features(
                prepare_input(found, builder), builder.teacher, builder.spec, advance=lambda _: None
            ).arrays
            pairs = [
                (values, arrays[f"attention_{layer}"].values.swapaxes(0, 1))
                for layer, values in stored.attention.items()
            ]
            if stored.vision_tokens is not None:
                pairs.append((stored.vision_tokens, arrays["vision_tokens"].values[0]))
            if stored.top_logprobs is not None:  # in order of size: ids may change places
                pairs.append((stored.top_logprobs, arrays["top_logprobs"].values))
            worst = max(worst, *(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs))
    return worst


if __name__ == "__main__":
    main()
