"""What a build costs beside its teacher, on the CPU: one table of ratios from one run.

    python -m benchmarks.build

Makes a random teacher and random photos in a temporary folder. Every way runs in turn, several
times over, and each ratio is the median of those within one turn, so that a machine that is busy
with other work slows both sides. Times are wall clock.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.inputs import SMALL, TeacherSize, write_tars, write_teacher
from cache_builder.build import Builder, build_cache, commit_shard
from cache_builder.features import ShardFeatures, compute_features
from cache_builder.prepare import PixelBatch, PreparedTar
from cache_builder.setup import load_builder
from cache_builder.teacher import Signals, Teacher
from shared.checkpoint import ModelFolder
from shared.mobilevlm import MobileVLM, load_model
from shared.samples import TarIndex, index_tar
from shared.sequence import SequenceBatch, pad_sequences
from shared.spec import CacheSpec

ALIGN_ONLY = Path(__file__).parents[1] / "cache_specs" / "align-only.yaml"


@dataclass
class Timed(Teacher):
    """A teacher and the seconds that it takes. What it says is not kept: new memory costs time."""

    teacher: Teacher
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.config = self.teacher.config

    def vision_tokens(self, pixels: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N V C"]:
        with self._timed():
            return self.teacher.vision_tokens(pixels)

    def signals(self, batch: SequenceBatch, vision: Sequence[Float[Tensor, "V C"]]) -> Signals:
        with self._timed():
            return self.teacher.signals(batch, vision)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


@dataclass
class Recorded(Teacher):
    """Stands in for a teacher: says it the first time, then says the same again, in order."""

    teacher: Teacher
    vision: list[Tensor] = field(default_factory=list)
    said: list[Signals] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = self.teacher.config
        self.again: tuple[Iterator[Tensor], Iterator[Signals]] | None = None

    def rewind(self) -> None:
        """From now on, or once more, from the beginning."""
        self.again = iter(self.vision), iter(self.said)

    def vision_tokens(self, pixels: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N V C"]:
        if self.again is None:
            self.vision.append(self.teacher.vision_tokens(pixels))
            return self.vision[-1]
        return next(self.again[0])

    def signals(self, batch: SequenceBatch, vision: Sequence[Float[Tensor, "V C"]]) -> Signals:
        if self.again is None:
            self.said.append(self.teacher.signals(batch, vision))
            return self.said[-1]
        return next(self.again[1])


@dataclass
class Inputs:
    """All that the timed ways share."""

    builder: Builder
    indexes: list[TarIndex]
    pixels: dict[str, list[PixelBatch]]
    "Ready pixels, by tar."
    prepared: dict[str, PreparedTar]
    "Ready prompts, by tar."
    recorded: Recorded
    "What the teacher says of all of them."
    whole: MobileVLM
    "The whole teacher, eager attention."
    out: Path
    "Where caches go."
    caches: int = 0

    @property
    def num_samples(self) -> int:
        """Of all tars."""
        return sum(len(tar.samples) for tar in self.prepared.values())

    def tars(self) -> Iterator[PreparedTar]:
        """Every tar with its pixels ready."""
        for name, tar in self.prepared.items():
            tar.pixels = iter(self.pixels[name])
            yield tar

    def features(self, teacher: Teacher) -> Iterator[tuple[TarIndex, ShardFeatures]]:
        """What `teacher` says of every tar, encoded."""
        for tar in self.tars():
            yield (
                tar.index,
                compute_features(tar, teacher, self.builder.spec, advance=lambda _: None),
            )

    def new_cache(self) -> Path:
        """A folder that is not there yet; the last one goes."""
        shutil.rmtree(self.out / f"cache-{self.caches}", ignore_errors=True)
        self.caches += 1
        return self.out / f"cache-{self.caches}"


def time_tower(inputs: Inputs) -> float:
    """Tower and projector alone on ready pixels, in the build's batches."""
    start = time.perf_counter()
    for batches in inputs.pixels.values():
        for batch in batches:
            inputs.builder.teacher.vision_tokens(batch.pixels)
    return time.perf_counter() - start


def time_build(inputs: Inputs) -> float:
    """The command's whole work, from tars to the last committed record."""
    out = inputs.new_cache()
    start = time.perf_counter()
    build_cache(inputs.builder, [index.path for index in inputs.indexes], out)
    return time.perf_counter() - start


def time_teacher(inputs: Inputs) -> float:
    """The teacher alone, on ready inputs and in the build's batches."""
    timed = Timed(inputs.builder.teacher)
    for _ in inputs.features(timed):
        pass
    return timed.seconds


def time_write(inputs: Inputs) -> float:
    """Encode and write alone, on ready signals."""
    out = inputs.new_cache()
    inputs.recorded.rewind()
    start = time.perf_counter()
    for index, features in inputs.features(inputs.recorded):
        commit_shard(inputs.builder, index, features, out)
    return time.perf_counter() - start


@torch.inference_mode()
def time_usual(inputs: Inputs, samples: int) -> float:
    """Seconds per sample of the whole model with output_attentions=True, on ready inputs."""
    tar = next(inputs.tars())
    batch = tar.batches[0][:samples]
    pixels = next(tar.pixels).pixels[: len(batch)]
    sequences = pad_sequences(
        [item.prompt.input_ids for item in batch], [item.prompt.labels for item in batch]
    )
    start = time.perf_counter()
    vision = inputs.whole.encode_images(pixels)
    embedded = inputs.whole.embed(sequences.ids, sequences.vision_mask, vision)
    maps = inputs.whole.llm(inputs_embeds=embedded, output_attentions=True).attentions
    assert len(maps) == inputs.whole.llm.config.num_hidden_layers
    return (time.perf_counter() - start) / len(batch)


@click.command()
@click.option("--tars", default=3, show_default=True, help="Tars to build.")
@click.option("--samples", default=64, show_default=True, help="Samples in each.")
@click.option("--turns", default=4, show_default=True, help="Times that every way runs.")
@click.option("--threads", default=len(os.sched_getaffinity(0)), show_default=True, help="Torch's.")
@click.option("--short", is_flag=True, help="A tiny teacher, to see that this script runs.")
def main(tars: int, samples: int, turns: int, threads: int, short: bool) -> None:
    """Time builds and their parts."""
    torch.set_num_threads(threads)
    size, picture = (SMALL, (64, 48)) if short else (TeacherSize(), (640, 480))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(write_teacher(folder / "teacher", size))
        paths = write_tars(folder / "tars", tars=tars, samples=samples, size=picture)
        inputs = _ready(folder, paths)
        rows = [
            len(item.prompt.input_ids) - (item.prompt.vision_start or 0) - 1
            for tar in inputs.prepared.values()
            for item in tar.samples
        ]
        print(
            f"data: {tars} tars of {samples} samples, JPEGs of {picture[0]} x {picture[1]}, "
            f"{statistics.mean(rows):.0f} text rows each on average; {threads} threads, "
            f"load {os.getloadavg()[0]:.1f} at the start"
        )
        _print(_measure(inputs, turns), inputs.num_samples, turns)


def _ready(folder: Path, paths: list[Path]) -> Inputs:
    spec = CacheSpec.load(ALIGN_ONLY)
    builder = load_builder(
        spec, str(folder / "teacher"), vision_tower=None, device="cpu", dtype=None, batch_size=None
    )
    indexes = [index_tar(path) for path in paths]
    with builder.reader() as reader:
        prepared = {index.name: reader(index) for index in indexes}
        pixels = {name: list(tar.pixels) for name, tar in prepared.items()}
    whole = load_model(ModelFolder(str(folder / "teacher"))).eval()
    whole.llm.set_attn_implementation("eager")
    inputs = Inputs(
        builder=builder, indexes=indexes, pixels=pixels, prepared=prepared,
        recorded=Recorded(builder.teacher), whole=whole, out=folder,
    )  # fmt: skip
    for _ in inputs.features(inputs.recorded):
        pass
    return inputs


def _measure(inputs: Inputs, turns: int) -> dict[str, list[float]]:
    """Seconds per sample of every way, turn by turn."""
    seconds: dict[str, list[float]] = {}
    ways: dict[str, Callable[[], float]] = {
        "tower": lambda: time_tower(inputs) / inputs.num_samples,
        "teacher": lambda: time_teacher(inputs) / inputs.num_samples,
        "write": lambda: time_write(inputs) / inputs.num_samples,
        "build": lambda: time_build(inputs) / inputs.num_samples,
        "usual": lambda: time_usual(inputs, 4),
    }
    for turn in range(turns + 1):
        found = {name: way() for name, way in ways.items()}
        for name, value in found.items() if turn else ():  # the first turn warms up
            seconds.setdefault(name, []).append(value)
    return seconds


def _print(seconds: dict[str, list[float]], samples: int, turns: int) -> None:
    def ratio(one: Callable[[dict[str, float]], float]) -> float:
        turn = [
            dict(zip(seconds, values, strict=True))
            for values in zip(*seconds.values(), strict=True)
        ]
        return statistics.median(map(one, turn))

    titles = {
        "tower": "tower and projector alone, ready pixels",
        "teacher": "teacher alone, ready inputs",
        "write": "encode and write alone, ready signals",
        "build": "build-cache, align-only, from tars",
        "usual": "whole forward, output_attentions=True, ready inputs",
    }
    print(f"\n{'way':<54} {'ms/sample':>10}")
    for name, title in titles.items():
        print(f"{title:<54} {1e3 * statistics.median(seconds[name]):>10.1f}")
    print(f"\n{'ratio':<54} {'median':>10} {'wanted':>10}")
    for title, wanted, value in (
        ("samples/s, build / tower alone", ">= 0.8", ratio(lambda t: t["tower"] / t["build"])),
        (
            "seconds, build / max(teacher, encode and write)", "<= 1.15",
            ratio(lambda t: t["build"] / max(t["teacher"], t["write"])),
        ),
        ("samples/s, build / whole forward", "", ratio(lambda t: t["usual"] / t["build"])),
    ):  # fmt: skip
        print(f"{title:<54} {value:>10.2f} {wanted:>10}")
    print(f"\nmedians of {turns} turns of {samples} samples each")


if __name__ == "__main__":
    main()
