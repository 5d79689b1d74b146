"""Align-KD minus baseline on easy-vqa, by seeds 0 to 4: `make seeds`, an hour or two on two cores.

Same data, same steps; the seed sets the student's first weights and the order of the data. Settings
were chosen on the validation split; this asks the test questions, once. The same students are
trained from three caches, which differ in how values are stored: exactly, as in the demo (6 bits),
and in 4 bits.
"""

import dataclasses
import json
import os
import shutil
import statistics
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import yaml

from examples.easy_vqa.steps import (
    SPEC,
    TRAIN_QUESTIONS,
    StudentResult,
    build,
    prepare_split,
    train,
    write_student,
)

OUT = Path("seeds-run")
TEST_QUESTIONS = 2000
"Of 9,673, the same for all."
ENCODINGS = {
    "float32": ("float32", "float32", "float32"),
    "default": ("sqrt6", "channel6", "logprob8"),
    "small": ("sqrt4", "channel4", "logprob8"),
}
"Name -> encodings of attention, vision tokens, log-probabilities."
WAYS = ("baseline", *ENCODINGS)


@click.command()
@click.option("--jobs", default=2, show_default=True, help="Students trained at the same time.")
@click.option("--seeds", nargs=2, type=int, default=(0, 4), show_default=True, help="First, last.")
@click.option(
    "--ways",
    multiple=True,
    type=click.Choice(WAYS),
    default=WAYS,
    show_default=True,
    help="Students of each seed.",
)
@click.option("--resume", is_flag=True, help="Keep caches and students of a run that was killed.")
def main(jobs: int, seeds: tuple[int, int], ways: tuple[str, ...], resume: bool) -> None:
    """Train a student for each seed and way; print a Markdown table."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    numbers = range(seeds[0], seeds[1] + 1)
    if len(numbers) < 2:
        raise click.UsageError("--seeds: first and last, and at least two, to have an error of")
    # What the runs start from is made anew each time, to the same bytes.
    start = OUT / "start"
    shutil.rmtree(start if resume else OUT, ignore_errors=True)
    train_tars = prepare_split(start, "train", TRAIN_QUESTIONS)
    test_tars = prepare_split(start, "test", TEST_QUESTIONS)
    models = {seed: write_student(start, seed) for seed in numbers}

    def one(name: str, cache: Path | None, seed: int) -> StudentResult:
        out = OUT / f"{name}-{seed}"
        done = out / "result.json"
        if done.exists():
            return StudentResult(**json.loads(done.read_text()) | {"export": out / "export"})
        shutil.rmtree(out, ignore_errors=True)
        result = train(out, models[seed], train_tars, test_tars, cache, seed)
        partial = done.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(result), default=str))
        partial.replace(done)
        return result

    caches = {
        name: build(OUT / name, train_tars, _spec(name)) if name in ENCODINGS else None
        for name in ways
    }
    with ThreadPoolExecutor(jobs) as pool:  # seed after seed: what a killed run leaves is whole
        students = {
            seed: {name: pool.submit(one, name, cache, seed) for name, cache in caches.items()}
            for seed in numbers
        }
        _print(
            {
                seed: {name: 100 * student.result().exact_match for name, student in row.items()}
                for seed, row in students.items()
            }
        )


def _spec(name: str) -> Path:
    values = yaml.safe_load(SPEC.read_text())
    signals = ("attention", "vision_tokens", "logprobs")
    for signal, encoding in zip(signals, ENCODINGS[name], strict=True):
        values[signal]["encoding"] = encoding
    (OUT / name).mkdir(parents=True, exist_ok=True)
    (OUT / name / "cache.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return OUT / name / "cache.yaml"


def _print(matches: Mapping[int, Mapping[str, float]]) -> None:
    """Exact match in percent by seed and way, and differences paired by seed."""
    names = list(next(iter(matches.values())))
    print("\n| seed | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for seed, row in matches.items():
        print(f"| {seed} | " + " | ".join(f"{row[name]:.2f} %" for name in names) + " |")
    means = [statistics.mean(row[name] for row in matches.values()) for name in names]
    print("| mean | " + " | ".join(f"{mean:.2f} %" for mean in means) + " |")
    for other in [name for name in ("baseline", "float32") if name in names]:
        cells = []
        for name in names:
            gains = [row[name] - row[other] for row in matches.values()]
            error = statistics.stdev(gains) / len(gains) ** 0.5
            cells.append(f"{statistics.mean(gains):+.2f} ({error:.2f})" if name != other else "")
        print(f"| minus {other} (standard error) | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
