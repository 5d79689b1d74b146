"""The golden caches in cache_specs/golden/: made once per format version, opened for ever.

python -m tests.golden        # only for a new format version; see CONTRIBUTING.md
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.cache import Cache
from tests.support import FULL, annotation, build, png, sample, text_sample, write_tar

GOLDEN = Path(__file__).parents[1] / "cache_specs" / "golden"
TAR = GOLDEN / "golden.tar"
SHARD = "golden"


def _spec(attention: str, vision_tokens: str, logprobs: str | None) -> dict[str, Any]:
    return {
        **FULL,
        "attention": {"layers": [1], "encoding": attention},
        "vision_tokens": {"encoding": vision_tokens},
        "logprobs": logprobs and {"top_k": 8, "encoding": logprobs},
    }


SPECS = {
    "exact": _spec("float32", "float32", "float32"),
    "bits6": _spec("sqrt6", "channel6", "logprob8"),
    "bits4": _spec("sqrt4", "channel4", None),
}
"Folder of a golden cache -> the spec that it was built from."

Decoded = dict[str, npt.NDArray[Any]]


def decoded(cache: Cache) -> Decoded:
    """`KEY/FIELD` -> what the reading API gives; an image's tokens with its first sample only."""
    values: Decoded = {}
    seen: set[bytes] = set()
    for key in cache.keys():  # noqa: SIM118  (a Cache is not a dict)
        found = cache.read(key)
        fields = {
            "input_ids": found.input_ids,
            "labels": found.labels,
            "vision_start": np.array(-1 if found.vision_start is None else found.vision_start),
            "top_ids": found.top_ids,
            "top_logprobs": found.top_logprobs,
            "rest_logprobs": found.rest_logprobs,
            **{f"attention_{layer}": values for layer, values in found.attention.items()},
        }
        tokens = found.vision_tokens
        if tokens is not None and tokens.tobytes() not in seen:
            fields["vision_tokens"] = tokens
            seen.add(tokens.tobytes())
        values |= {f"{key}/{name}": value for name, value in fields.items() if value is not None}
    return values


def expected(name: str) -> Decoded:
    """The stored values of a golden cache."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def make_tar(path: Path) -> Path:
    """Two conversations about one image and one without."""
    return write_tar(
        path,
        sample("one", annotation("<image>\nwhat", "red"), png(7, (9, 6))),
        text_sample("text"),
        sample("two", annotation("<image>\nwho", "no"), png(7, (9, 6))),
    )


def make() -> None:
    """Write everything anew."""
    from shared.cache import open_cache

    if GOLDEN.exists():
        sys.exit(f"{GOLDEN}: is there; golden caches are made once, delete it for a new format")
    make_tar(TAR)
    for name, spec in SPECS.items():
        build(GOLDEN / name, TAR, spec)
        shutil.rmtree(GOLDEN / name / "plans")  # nothing needs them
        np.savez_compressed(
            GOLDEN / f"{name}.npz", allow_pickle=False, **decoded(open_cache(GOLDEN / name))
        )


if __name__ == "__main__":
    make()
