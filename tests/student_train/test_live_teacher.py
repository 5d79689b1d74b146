"""A cache stands in for the teacher: the training loop cannot tell one from the other."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cache_builder.build import Builder
from cache_builder.features import ShardFeatures, compute_features
from cache_builder.prepare import TarReader, prepare
from shared.cache import Cache, CachedSample
from shared.encodings import decode
from shared.samples import TarIndex, index_tar
from shared.spec import CacheSpec
from student_train.config import Recipe
from student_train.data import TeacherSource
from student_train.loop import make_accelerator, train
from student_train.runs import RunFolder
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

    def num_tokens(self, key: str) -> int:
        (found,) = prepare(self._where[key], self.spec, self._builder.tokenizer)
        return found.num_tokens  # type: ignore[union-attr]

    def read(self, key: str) -> CachedSample:
        self.runs += 1
        index: TarIndex = self._where[key]
        loaded = self._builder
        with TarReader(
            self.spec, loaded.tokenizer, loaded.processor, batch_size=1, pin=False
        ) as reader:
            shard = compute_features(
                reader(index), loaded.teacher, self.spec, advance=lambda _: None
            )
        (sample,) = shard.samples
        vision = decoded(shard, "vision_tokens")
        layers = self.spec.attention_layers if sample.image_digest else ()
        return CachedSample(
            key=key,
            input_ids=sample.prompt.input_ids,
            labels=sample.prompt.labels,
            vision_start=sample.prompt.vision_start,
            attention={n: decoded(shard, f"attention_{n}").swapaxes(0, 1) for n in layers},
            vision_tokens=None if vision is None else vision[0],
            top_ids=shard.arrays["top_ids"][1],
            top_logprobs=decoded(shard, "top_logprobs"),
            rest_logprobs=decoded(shard, "rest_logprobs"),
        )


def decoded(shard: ShardFeatures, name: str) -> Any:
    """A float32 array of a shard, None if it has none of that name."""
    return decode("float32", {"": shard.arrays[name][1]}) if name in shard.arrays else None


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
