"""A cache stands in for the teacher: the training loop cannot tell one from the other."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cache_builder.build import Builder
from cache_builder.features import ShardFeatures, compute_features
from cache_builder.prepare import TarReader, prepare
from shared.cache import Cache, EncodedBatch, Signal
from shared.samples import TarIndex, index_tar
from shared.spec import CacheSpec
from student_train.config import Recipe
from student_train.loop import make_accelerator, train
from student_train.runs import RunFolder
from student_train.training_set import TeacherSource
from tests.student_train.support import (
    SPEC,
    aligned,
    log_lines,
    recipe,
    relative,
    training_set,
)
from tests.support import builder


class LiveTeacher:
    """A teacher source without a cache: the teacher runs whenever a sample is read."""

    def __init__(self, loaded: Builder, tars: list[Path]) -> None:
        self._builder = loaded
        self._where = {
            sample.key: dataclasses.replace(index, samples=(sample,), skipped={})
            for index in map(index_tar, tars)
            for sample in index.samples
        }
        self.runs = 0

    @property
    def spec(self) -> CacheSpec:
        return self._builder.spec

    def keys(self) -> list[str]:
        return list(self._where)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        found = [
            next(iter(prepare(index, self.spec, self._builder.tokenizer)))
            for index in self._where.values()
        ]
        return np.array([sample.num_tokens for sample in found], dtype=np.int32)  # type: ignore[union-attr]

    def read_batch(self, keys: Sequence[str], signals: Collection[Signal]) -> EncodedBatch:
        self.runs += len(keys)
        shards = [self._run(self._where[key]) for key in keys]
        prompts = [shard.samples[0].prompt for shard in shards]
        layers = self.spec.attention_layers

        def pieces(name: str) -> list[npt.NDArray[Any]]:
            return [shard.arrays[name].values for shard in shards if name in shard.arrays]

        return EncodedBatch(
            input_ids=[prompt.input_ids for prompt in prompts],
            labels=[prompt.labels for prompt in prompts],
            attention={
                layer: {"": padded(found)}
                for layer in layers
                if (found := pieces(f"attention_{layer}"))
            },
            vision_tokens=joined(pieces("vision_tokens")),
            top_ids=np.concatenate(pieces("top_ids")),
            top_logprobs=joined(pieces("top_logprobs")),
            rest_logprobs=joined(pieces("rest_logprobs")).get(""),
            image_sha256=[
                bytes.fromhex(digest) if (digest := shard.samples[0].image_digest) else None
                for shard in shards
            ],
        )

    def _run(self, index: TarIndex) -> ShardFeatures:
        loaded = self._builder
        with TarReader(
            self.spec, loaded.tokenizer, loaded.processor, batch_size=1, pin=False
        ) as reader:
            return compute_features(
                reader(index), loaded.teacher, self.spec, advance=lambda _: None
            )


def padded(pieces: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """[Q, H, V] arrays as one [N, Q, H, V], zeros behind the shorter."""
    longest = max(map(len, pieces))
    return np.stack(
        [np.pad(piece, ((0, longest - len(piece)), (0, 0), (0, 0))) for piece in pieces]
    )


def joined(pieces: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {"": np.concatenate(pieces)} if pieces else {}


def losses(
    out: Path, source: TeacherSource, cache: Cache, changed: Recipe, tars: list[Path]
) -> list[dict[str, float]]:
    """The log of a run on this source."""
    accelerator = make_accelerator(changed, cpu=True)
    samples = training_set(tars, changed, source)
    train(aligned(changed, cache), samples, None, RunFolder(out), accelerator, None)
    return log_lines(out)


@pytest.mark.parametrize("top_k", [512, 20])
def test_20_steps_from_a_cache_and_with_the_teacher_in_the_loop_give_the_same_losses(
    top_k: int, tars: list[Path], full_cache: Cache, tmp_path: Path
) -> None:
    spec = {**SPEC, "logprobs": {"top_k": top_k, "encoding": "float32"}}
    loaded = builder(spec)
    cache = full_cache
    if top_k != 512:
        from cache_builder.build import build_cache
        from shared.cache import open_cache

        build_cache(loaded, tars, tmp_path / "cache")
        cache = open_cache(tmp_path / "cache")
    changed = recipe(global_batch=4, micro_batch=4, epochs=4, max_steps=20, save_every=100)
    live = LiveTeacher(loaded, tars)

    cached_log = losses(tmp_path / "cached", cache, cache, changed, tars)
    live_log = losses(tmp_path / "live", live, cache, changed, tars)

    assert live.runs == 20 * 4
    assert len(cached_log) == len(live_log) == 20
    worst = max(
        relative(one[name], other[name])
        for one, other in zip(cached_log, live_log, strict=True)
        for name in ("loss", "sup", "kl", "attention", "vision_all", "vision_focus")
    )
    assert worst < 1e-5
    assert cached_log[-1]["loss"] < cached_log[0]["loss"]
