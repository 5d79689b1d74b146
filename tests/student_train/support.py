"""A training set, recipes and runs for these tests, made by the code that users run."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from click.testing import Result
from torch import Tensor

from shared.cache import Cache
from shared.checkpoint import ModelFolder
from shared.images import ImageProcessor
from shared.mobilevlm import load_model
from shared.strict import parse
from shared.tokenizer import load_tokenizer
from student_train.batch import TrainingBatch
from student_train.cli import train_student
from student_train.config import Recipe
from student_train.loop import make_accelerator
from student_train.student import AlignedStudent, TeacherShape
from student_train.training_set import TeacherSource, TrainingSet, load_training_set
from tests.processes import start_training
from tests.support import ATTENTION, CLIP, FULL, REFERENCE, annotation, invoke, png, sample

STUDENT = REFERENCE / "student"
SPEC = {**FULL, "attention": {**ATTENTION, "layers": [0, 1]}}
"All signals, exact, of two layers."

RECIPE: dict[str, Any] = {
    "template": "v1",
    "image_aspect": "pad",
    "global_batch": 8,
    "micro_batch": 8,
    "workers": 0,
    "log_every": 1,
    "optim": {"lr": 1e-3, "projector_lr": 2e-3},
    "loss": {"layer_map": {0: 0, 1: 1}},
}

_WORDS = (
    "train", "no", "picture", "boat", "there", "right", "station", "bottom", "red", "sky", "blue",
    "what", "is", "the", "color",
)  # fmt: skip


def mixed_samples(number: int) -> list[list[tuple[str, bytes]]]:
    """Samples of many lengths; every third is text only; images of several shapes."""
    return [_mixed_sample(n) for n in range(number)]


def _mixed_sample(n: int) -> list[tuple[str, bytes]]:
    words = [_WORDS[(n * 7 + i * (n % 5 + 1)) % len(_WORDS)] for i in range(3 + n % 11)]
    question, answer = " ".join(words), " ".join(reversed(words[: 1 + n % 4]))
    more = ("and where", "on the " + words[0]) if n % 4 == 1 else ()
    if n % 3 == 2:
        return sample(f"s{n:03d}", annotation(question, answer, *more), image=None)
    image = png(n % 6, size=(20 + n % 6, 30))
    return sample(f"s{n:03d}", annotation("<image>\n" + question, answer, *more), image=image)


def recipe(**changes: Any) -> Recipe:
    """The tests' recipe with some fields changed."""
    return parse(Recipe, {**RECIPE, **changes}, where="test")


def training_set(
    tars: Sequence[Path], changed: Recipe, source: TeacherSource | None
) -> TrainingSet:
    """What `train-student` makes of the tars."""
    return load_training_set(
        tars, changed, load_tokenizer(STUDENT), ImageProcessor(CLIP, changed.image_aspect), source
    )


def aligned(changed: Recipe, cache: Cache | None, seed: int = 0) -> AlignedStudent:
    """The reference student with fresh adapters."""
    torch.manual_seed(seed)
    model = load_model(ModelFolder(str(STUDENT)), str(CLIP))
    if cache is None:
        return AlignedStudent(model, changed.loss, train_tower=changed.train_tower)
    return AlignedStudent(
        model, changed.loss, teacher=TeacherShape.of(cache.identity), spec=cache.spec,
        train_tower=changed.train_tower,
    )  # fmt: skip


def gradients_of(
    student: AlignedStudent, batches: Sequence[TrainingBatch], changed: Recipe
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Loss terms and gradients of one global batch, as the training loop computes them."""
    from student_train.loop import _gradients

    accelerator = make_accelerator(changed, cpu=True)
    if changed.gradient_checkpointing:
        student.model.llm.activation_checkpointing_enable({"use_reentrant": False})
    module = accelerator.prepare(student).train()
    terms = _gradients(module, student, batches, accelerator)
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in student.named_parameters()
        if parameter.grad is not None
    }
    return terms, gradients


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Norm of the difference of two gradients, relative to the norm of the first."""
    assert one.keys() == other.keys()
    squares = sum(float((one[k] - other[k]).double().square().sum()) for k in one)
    whole = sum(float(value.double().square().sum()) for value in one.values())
    return float((squares / whole) ** 0.5)


def relative(one: float, other: float) -> float:
    """Relative difference of two numbers."""
    return abs(one - other) / max(abs(one), abs(other), 1e-300)


def arguments(
    out: Path, tars: Sequence[Path], cache: Path | None, recipe_file: Path, *options: object
) -> list[str]:
    """What stands behind `train-student`."""
    given = [
        *("--student", STUDENT, "--vision-tower", CLIP, "--out", out, "--recipe", recipe_file),
        *(text for tar in tars for text in ("--data", tar)),
        *(("--cache", cache) if cache else ()),
        *("--cpu", *options),
    ]
    return [str(item) for item in given]


def write_recipe(path: Path, **changes: Any) -> Path:
    """A recipe file (JSON is YAML)."""
    path.write_text(json.dumps(recipe(**changes).to_dict()))
    return path


def train(
    out: Path, tars: Sequence[Path], cache: Path | None, *options: object, **changes: Any
) -> Result:
    """Run `train-student` in this process. A later option overrides an earlier one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = write_recipe(out.parent / f"{out.name}.yaml", **changes)
    return invoke(train_student, *arguments(out, tars, cache, file, *options))


def environment() -> dict[str, str]:
    """For processes of a test: one thread, no GPU, no network."""
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def command_line(*given: str) -> list[str]:
    """`train-student` as a process of its own."""
    code = "from student_train.cli import train_student; train_student()"
    return [sys.executable, "-c", code, *given]


def run_process(command: Sequence[str]) -> str:
    """Run to the end; stdout. A failure shows stderr."""
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def train_in_process(given: Sequence[str], log: Path) -> Any:
    """`train-student --json` in a process of its own, to the end; what it says."""
    process = start_training(given, log)
    process.join(200)
    assert process.exitcode == 0, log.read_text()[-4000:]
    return said(log)


def said(log: Path) -> Any:
    """What a process with `--json` said, among what it logged."""
    (line,) = (line for line in log.read_text().splitlines() if line.startswith("{"))
    return json.loads(line)


def signal_when(
    given: Sequence[str], due: Callable[[], bool], number: int, log: Path
) -> int | None:
    """Start `train-student` and send it, and those it started, a signal as soon as `due`.

    Returns:
        Its exit code; that of the signal is negative.
    """
    process = start_training(given, log)
    assert process.pid is not None
    while process.is_alive():
        if due():
            os.killpg(process.pid, number)
            break
        time.sleep(0.002)
    process.join(200)
    return process.exitcode


def log_lines(run: Path) -> list[dict[str, float]]:
    """The run's JSONL."""
    file = run / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def num_lines(run: Path) -> int:
    """Whole lines of the JSONL of a run that is going on."""
    file = run / "log.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def loss_lines(run: Path) -> list[dict[str, float]]:
    """The run's JSONL without what the clock decides."""
    return [
        {key: value for key, value in line.items() if key != "samples_per_second"}
        for line in log_lines(run)
    ]


def exported(run: Path) -> dict[str, Tensor]:
    """The export's tensors, read as a stranger would."""
    tensors: dict[str, Tensor] = torch.load(
        run / "export" / "pytorch_model.bin", weights_only=True, map_location="cpu"
    )
    return tensors


def batches_of(
    changed: TrainingSet, numbers: Sequence[int], micro_batch: int
) -> Iterator[TrainingBatch]:
    """Micro-batches of the given samples, in order."""
    for start in range(0, len(numbers), micro_batch):
        yield changed[list(numbers[start : start + micro_batch])]


def tensors_of(value: Any, where: str = "batch") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a batch and the path to each."""
    if isinstance(value, torch.Tensor):
        yield where, value
    elif dataclasses.is_dataclass(value) or isinstance(value, Mapping):
        parts = value if isinstance(value, Mapping) else vars(value)
        for name, part in parts.items():
            yield from tensors_of(part, f"{where}.{name}")
