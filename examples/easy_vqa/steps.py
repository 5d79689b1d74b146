"""The steps that demo, teacher and seeds share, each the command that a person would type."""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.easy_vqa.base_models import STUDENT, write_clip_of, write_llama
from examples.easy_vqa.prepare import Split, write_split

HERE = Path("examples/easy_vqa")
"Relative: all of this is run from the top of the repository, and commands are shown as typed."
TEACHER = HERE / "teacher"
SPEC = HERE / "cache.yaml"
RECIPE = HERE / "student.yaml"
TRAIN_QUESTIONS = 12000
"Of 34,700: a student has to learn from less than its teacher."


@dataclass(frozen=True, kw_only=True)
class StudentResult:
    """A trained and evaluated student."""

    export: Path
    "The model."
    exact_match: float
    "Share of right answers, 0..1."
    answers: int
    "Questions asked."
    steps: int
    "Optimiser steps."
    seconds: float
    "Training time, evaluation left out."


def run(*words: object) -> str:
    """Run one of the project's commands as a person would; what it printed to stdout."""
    command = [str(word) for word in words]
    print(f"\n$ {shlex.join(command)}", file=sys.stderr, flush=True)
    program = Path(sys.executable).parent / command[0]
    return subprocess.run(
        [str(program), *command[1:]], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def prepare_split(out: Path, split: Split, limit: int | None) -> str:
    """Tars of one split; the glob that names them."""
    report = write_split(split, out, limit=limit, samples_per_tar=1000)
    print(f"{split}: {report.samples} questions about {report.images} images", file=sys.stderr)
    return f"{out}/{split}-*.tar"


def build(out: Path, train: str, spec: Path) -> Path:
    """The teacher's cache of the training tars."""
    cache = out / "cache"
    run("build-cache", "--spec", spec, "--teacher", TEACHER, "--data", train, "--out", cache,
        "--batch-size", 64)  # fmt: skip
    return cache


def write_student(out: Path, seed: int) -> tuple[Path, Path]:
    """A random Llama, and the teacher's tower as a CLIP folder: (llama, clip)."""
    llama, clip = out / f"student-{seed}", out / "clip"
    if not clip.exists():
        write_clip_of(TEACHER, clip)
    write_llama(llama, STUDENT, (TEACHER / "tokenizer.model").read_bytes(), seed=seed)
    return llama, clip


def train(
    out: Path,
    models: tuple[Path, Path],
    train: str,
    evaluate: str,
    cache: Path | None,
    seed: int,
) -> StudentResult:
    """One student, evaluated on held-out tars; without a cache, plain supervised training."""
    llama, clip = models
    teaching = ("--cache", cache) if cache else ()
    printed = run(
        "train-student", *teaching, "--data", train, "--student", llama, "--vision-tower", clip,
        "--recipe", RECIPE, "--set", f"seed={seed}", "--eval-data", evaluate,
        "--out", out, "--json",
    )  # fmt: skip
    result = json.loads(printed)
    return StudentResult(
        export=out / "export",
        exact_match=result["exact_match"],
        answers=result["answers"],
        steps=result["steps"],
        seconds=result["seconds"],
    )
