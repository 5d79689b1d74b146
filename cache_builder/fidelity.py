"""What a cache's encodings lose: chosen samples run through the teacher again and kept exact.

The exact values come from the build's own code, with the cache's spec and number format but every
encoding float32. What they are compared with is read as a trainer reads it. What the difference
does to a student is measured by `student_train.fidelity`, in a process of its own: the two packages
never import each other, and teacher and student are never in memory together.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cache_builder.build import Builder, commit_shard
from cache_builder.features import compute_features
from cache_builder.setup import load_builder_of
from cache_builder.tars import refuse_other_tars
from shared.cache import Cache, CachedSample, open_cache
from shared.errors import InputError
from shared.progress import announced, progress
from shared.samples import TarIndex, index_tars, spread
from shared.spec import CacheSpec

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ArrayFidelity:
    """How far one array of a cache is from the teacher's."""

    array: str
    "Its name on disk."
    encoding: str
    "How it is stored."
    relative_l2: float
    "Norm of the error, as a share of the norm of the exact values."
    largest: float
    "Largest error, as a share of the largest exact value."


@dataclass(frozen=True, kw_only=True)
class CacheFidelity:
    """How far the chosen samples of a cache are from the teacher's."""

    samples: int
    "Samples compared."
    tars: tuple[Path, ...]
    "The tars that they are from."
    arrays: tuple[ArrayFidelity, ...]
    "One for each array of values."
    other_ids: float
    "Share of the top k ids that are others: 0, but for ties on another device."
    device: str
    "Where the teacher ran."


def measure_cache(
    root: Path,
    teacher: str,
    tars: Sequence[Path],
    exact: Path,
    *,
    vision_tower: str | None,
    device: str | None,
    samples: int,
) -> CacheFidelity:
    """Run the teacher on `samples` samples of the cache and compare.

    Args:
        exact: folder for the exact cache of those samples.

    Raises:
        MismatchError: another teacher, tokenizer, image processor or tar; both values are named.
        InputError: none of the cache's samples is in the tars.
    """
    cache = open_cache(root)
    chosen = choose_samples(cache, tars, samples)
    advice = "Give the teacher and the tars that the cache was built with."
    builder = load_builder_of(
        cache, teacher, cache.spec.exact(), advice, vision_tower=vision_tower, device=device,
        batch_size=None,
    )  # fmt: skip
    refuse_other_tars(cache.records, chosen, cache.root, advice)
    build_exact(builder, chosen, exact)
    differences = compare_samples(open_cache(exact), cache)
    return CacheFidelity(
        samples=sum(len(index.samples) for index in chosen),
        tars=tuple(index.path for index in chosen),
        arrays=tuple(differences.arrays(cache.spec)),
        other_ids=differences.other_ids / max(1, differences.ids),
        device=str(builder.teacher.device),
    )


def measure_students(
    root: Path, exact: Path, found: CacheFidelity, options: Sequence[str]
) -> list[dict[str, Any]]:
    """What the difference does to students: `student_train.fidelity`'s report on each.

    Args:
        options: its options besides caches, tars and device.

    Raises:
        CalledProcessError: it failed, and has said why.
    """
    if found.device.startswith("cuda"):
        torch.cuda.empty_cache()  # the teacher's memory: the students need it
    tars = (text for tar in found.tars for text in ("--data", str(tar)))
    # -P: what lies in the current folder is not to be imported.
    command = [
        *(sys.executable, "-P", "-m", "student_train.fidelity"),
        *("--exact", str(exact), "--cache", str(root), "--device", found.device, *tars, *options),
    ]
    with announced("comparing the students"):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    students: list[dict[str, Any]] = json.loads(done.stdout)
    return students


def choose_samples(cache: Cache, tars: Sequence[Path], number: int) -> list[TarIndex]:
    """`number` of the cache's samples, evenly spread over its tars; of each tar, its share.

    Raises:
        InputError: none is in `tars`, or one of those cannot be read.
    """
    known = [tar for tar in tars if tar.name in {r.tar.name for r in cache.records.values()}]
    indexes = index_tars(known)
    usable = [(index, s) for index in indexes for s in index.samples if s.key in cache]
    if not usable:
        raise InputError(
            f"{cache.root}: none of its {len(cache)} samples is in the {len(tars)} tars of --data; "
            "give the tars that it was built from"
        )
    taken: dict[str, list[Any]] = {}
    for index, sample in spread(usable, number):
        taken.setdefault(index.name, []).append(sample)
    return [
        replace(index, samples=tuple(taken[index.name]), skipped={})
        for index in indexes
        if index.name in taken
    ]


def build_exact(builder: Builder, chosen: Sequence[TarIndex], out: Path) -> None:
    """Write a cache of the chosen samples, a shard for each tar."""
    total = sum(len(index.samples) for index in chosen)
    with (
        progress("teacher", "sample", total=total) as bar,
        builder.reader() as reader,
    ):
        for index in chosen:
            features = compute_features(
                reader(index), builder.teacher, builder.spec, advance=bar.update
            )
            commit_shard(builder, index, features, out)


@dataclass(kw_only=True)
class _Sums:
    """Sums over the values of one array."""

    error: float = 0.0
    "Of squared errors."
    exact: float = 0.0
    "Of squared exact values."
    largest_error: float = 0.0
    largest: float = 0.0

    def add(self, exact: Array, decoded: Array) -> None:
        wrong = decoded.astype(np.float64) - exact
        self.error += float(np.square(wrong).sum())
        self.exact += float(np.square(exact, dtype=np.float64).sum())
        self.largest_error = max(self.largest_error, float(np.abs(wrong).max(initial=0)))
        self.largest = max(self.largest, float(np.abs(exact).max(initial=0)))


@dataclass(kw_only=True)
class Differences:
    """Sums over the samples compared."""

    sums: dict[str, _Sums] = field(default_factory=dict)
    "Array -> its sums."
    ids: int = 0
    "Top k ids."
    other_ids: int = 0
    "Those that differ."

    def add(self, exact: CachedSample, decoded: CachedSample) -> None:
        """Compare one sample."""
        theirs = _arrays(decoded)
        for name, values in _arrays(exact).items():
            self.sums.setdefault(name, _Sums()).add(values, theirs[name])
        if exact.top_ids is not None and decoded.top_ids is not None:
            self.ids += exact.top_ids.size
            self.other_ids += int((exact.top_ids != decoded.top_ids).sum())

    def arrays(self, spec: CacheSpec) -> Iterator[ArrayFidelity]:
        """The result for each array of a cache of this spec."""
        for name, sums in self.sums.items():
            yield ArrayFidelity(
                array=name, encoding=_encoding(name, spec.encodings),
                relative_l2=float(np.sqrt(_share(sums.error, sums.exact))),
                largest=_share(sums.largest_error, sums.largest),
            )  # fmt: skip


def compare_samples(exact: Cache, cache: Cache) -> Differences:
    """Compare every sample of `exact` with the cache's."""
    found = Differences()
    for key in progress("compare", "sample", exact.keys()):
        found.add(exact.read(key), cache.read(key))
    return found


def _arrays(sample: CachedSample) -> dict[str, Array]:
    """A sample's float values by the name of their array."""
    found = {
        **{f"attention_{layer}": values for layer, values in sample.attention.items()},
        "vision_tokens": sample.vision_tokens,
        "top_logprobs": sample.top_logprobs,
        "rest_logprobs": sample.rest_logprobs,
    }
    return {name: values for name, values in found.items() if values is not None}


def _encoding(array: str, encodings: Mapping[str, str]) -> str:
    if array == "rest_logprobs":
        return "float32"  # whatever the others are
    signal = "attention" if array.startswith("attention_") else array.removeprefix("top_")
    return encodings[signal]


def _share(part: float, whole: float) -> float:
    """0 of nothing is 0: an array of zeros decodes to zeros."""
    return part / whole if whole else 0.0
