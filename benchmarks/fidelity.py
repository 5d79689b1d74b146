"""What the encodings do to a student's gradients on the demo's task: `make fidelity`, half an hour.

One Align-KD student is trained with exact targets, by the demo's recipe; `cache-tools fidelity`
then compares, at the start and at the end of that training, losses and gradients of the same steps
with exact and with decoded targets. A training of an earlier run in `fidelity-run/` is used again.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from examples.easy_vqa.steps import (
    RECIPE,
    SPEC,
    TEACHER,
    TRAIN_QUESTIONS,
    prepare_split,
    run,
    write_student,
)

OUT = Path("fidelity-run")
QUESTIONS = 480
"Compared: 30 steps of the recipe's 16."
COMPARED = OUT / "data" / "train-00000[048].tar"
"The tars that they are from: 3 of 12."
CODES = {
    "float32": ("float32", "float32", "float32"),
    "default": ("sqrt6", "channel6", "logprob8"),
    "small": ("sqrt4", "channel4", "logprob8"),
    "sqrt4 alone": ("sqrt4", "float32", "float32"),
    "channel4 alone": ("float32", "channel4", "float32"),
    "logprob8 alone": ("float32", "float32", "logprob8"),
}
"Spec -> encodings of attention, vision tokens, log-probabilities."
BARS = {"default": 0.999, "small": 0.995}
"Wanted of the whole gradient's cosine."


def main() -> None:
    """Train, build, compare; print Markdown tables."""
    end = trained()
    reports = {name: compared(name, OUT / "student-0", end) for name in BARS}
    print("| spec | array | encoding | relative L2 error | largest error |")
    print("|---|---|---|---|---|")
    for name, report in reports.items():
        for a in report["arrays"]:
            print(
                f"| {name} | {a['array']} | {a['encoding']} | {a['relative_l2']:.1e} "
                f"| {a['largest']:.1e} |"
            )
    print("\n| spec | training | of | value | relative error (worst) | gradient cosine (worst) |")
    print("|---|---|---|---|---|---|")
    for name, report in reports.items():
        for when, student in zip(("start", "end"), report["students"], strict=True):
            for line in lines(student):
                print(f"| {name} | {when} | {line}")
    print()
    for name, report in reports.items():
        print(verdict(name, report))
    print("\n| one array encoded, the others exact | gradient cosine of the loss, end (worst) |")
    print("|---|---|")
    for name in (name for name in CODES if name.endswith("alone")):
        (student,) = compared(name, end)["students"]
        print(f"| {name} | {cosines(student['terms']['loss'])} |")


def trained() -> Path:
    """The run of a student that learned from exact targets."""
    end = OUT / "align-kd"
    if not (end / "export").is_dir():
        train = prepare_split(OUT / "data", "train", TRAIN_QUESTIONS)
        cache = built("float32", train)
        llama, clip = write_student(OUT, seed=0)
        run(
            "train-student", "--cache", cache, "--data", train, "--student", llama,
            "--vision-tower", clip, "--recipe", RECIPE, "--out", end, "--cpu",
        )  # fmt: skip
    return end


def built(name: str, data: str) -> Path:
    """A cache of these tars with the demo's spec and other encodings."""
    spec = yaml.safe_load(SPEC.read_text())
    for signal, encoding in zip(
        ("attention", "vision_tokens", "logprobs"), CODES[name], strict=True
    ):
        spec[signal]["encoding"] = encoding
    name = name.replace(" ", "-")
    file = OUT / f"{name}.yaml"
    file.write_text(yaml.safe_dump(spec))
    cache = OUT / name
    run("build-cache", "--spec", file, "--teacher", TEACHER, "--data", data, "--out", cache,
        "--device", "cpu")  # fmt: skip
    return cache


def compared(name: str, *students: Path) -> dict[str, Any]:
    """The report of `cache-tools fidelity` on these students."""
    printed = run(
        "cache-tools", "fidelity", built(name, str(COMPARED)), "--teacher", TEACHER,
        "--data", COMPARED, "--device", "cpu", "--samples", QUESTIONS,
        *(word for student in students for word in ("--student", student)),
        "--student-vision-tower", OUT / "clip",
        "--recipe", RECIPE, "--json",
    )  # fmt: skip
    report: dict[str, Any] = json.loads(printed)
    return report


def lines(student: Mapping[str, Any]) -> Iterator[str]:
    """A table's cells for each loss term and each group of parameters."""
    for name, term in student["terms"].items():
        error = f"{term['error']:.1e} ({term['worst_error']:.1e})"
        yield f"{name} | {term['value']:.3g} | {error} | {cosines(term)} |"
    for name, group in student["groups"].items():
        yield f"loss, by the {name} | | | {cosines(group)} |"


def cosines(found: Mapping[str, float]) -> str:
    """Mean over the steps, and the worst step."""
    return f"{found['cosine']:.5f} ({found['worst_cosine']:.5f})"


def verdict(name: str, report: Mapping[str, Any]) -> str:
    """Whether the bar is met by the whole gradient, in the mean and in the worst step."""
    bar, whole = BARS[name], [student["terms"]["loss"] for student in report["students"]]
    said = [
        f"{what} {'met' if low >= bar else 'MISSED'} ({low:.5f})"
        for what, low in (
            ("mean over steps", min(found["cosine"] for found in whole)),
            ("every step", min(found["worst_cosine"] for found in whole)),
        )
    ]
    return f"{name}: gradient cosine of the loss >= {bar}: {', '.join(said)}"


if __name__ == "__main__":
    main()
