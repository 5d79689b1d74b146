"""How much memory builds and training runs take at their peak: one table from one run.

    python -m benchmarks.memory

Every configuration runs in a process of its own and reports the largest resident set that Linux saw
of it (VmHWM; pages of mapped files count). Two questions: what a partial teacher saves over loading
the whole one, and whether memory grows with the number of samples. Over its first few tars a build
grows a little, while the C allocator's pools fill; 1x has more tars than that.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.inputs import SMALL, TeacherSize, write_tars, write_teacher
from tests.support import CLIP, REFERENCE

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "cache_specs" / "align-only.yaml"

_CHILD = """
from pathlib import Path
import torch
torch.set_num_threads(1)
{work}
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""
_IMPORTS = "import cache_builder.build, cache_builder.setup"
_WHOLE = """
from shared.checkpoint import ModelFolder
from shared.mobilevlm import load_model
load_model(ModelFolder({teacher!r}))
"""


def peak(work: str) -> float:
    """Peak resident megabytes of a process that runs `work`."""
    command = [sys.executable, "-c", _CHILD.format(work=work)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(found.stderr)
    return int(found.stdout.split()[-1]) / 1000


def build_work(teacher: Path, tars: str, out: Path) -> str:
    """Python text that builds a cache as the command does."""
    arguments = [
        "--spec", str(SPEC), "--teacher", str(teacher), "--data", tars, "--out", str(out),
        "--device", "cpu",
    ]  # fmt: skip
    return (
        "from cache_builder.cli import build_cache\n"
        f"build_cache({arguments!r}, standalone_mode=False)"
    )


def train_work(cache: Path, tars: str, out: Path) -> str:
    """Python text that trains the tests' student for one epoch."""
    arguments = [
        "--cache", str(cache), "--data", tars, "--student", str(REFERENCE / "student"),
        "--vision-tower", str(CLIP), "--out", str(out), "--cpu", "--recipe", "stage2",
        "--set", "global_batch=8", "--set", "micro_batch=8", "--set", "workers=0",
        "--set", "precision=float32", "--set", "gradient_checkpointing=false",
        "--set", "loss.kl=0",
    ]  # fmt: skip
    return (
        "from student_train.cli import train_student\n"
        f"train_student({arguments!r}, standalone_mode=False)"
    )


@click.command()
@click.option("--tars", default=6, show_default=True, help="Tars at 1x; ten times as many at 10x.")
@click.option("--samples", default=50, show_default=True, help="Samples in each.")
def main(tars: int, samples: int) -> None:
    """Measure peaks."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _print_partial(folder)
        _print_growth(folder, tars, samples)


def _print_partial(folder: Path) -> None:
    teacher = folder / "teacher"
    print(write_teacher(teacher, TeacherSize()))
    write_tars(folder / "photos", tars=2, samples=32, size=(640, 480))
    weights = sum(path.stat().st_size for path in teacher.glob("*.bin")) / 1e6
    imports = peak(_IMPORTS)
    whole = peak(_WHOLE.format(teacher=str(teacher)))
    build = peak(build_work(teacher, f"{folder}/photos/*.tar", folder / "partial"))
    shutil.rmtree(teacher)
    print(f"\n{'process':<56} {'peak MB':>9}")
    print(f"{'imports only':<56} {imports:>9.0f}")
    print(f"{'load the whole teacher':<56} {whole:>9.0f}")
    print(f"{'build-cache, align-only, 64 samples':<56} {build:>9.0f}")
    print(f"\n{'ratio':<56} {'found':>9} {'wanted':>9}")
    print(f"{'build / load the whole teacher':<56} {build / whole:>9.2f} {'<= 0.3':>9}")
    print(f"{'the same, imports taken off':<56} {(build - imports) / (whole - imports):>9.2f}")
    print(f"{'build / (imports + weights on disk)':<56} {build / (imports + weights):>9.2f}")


def _print_growth(folder: Path, tars: int, samples: int) -> None:
    teacher = folder / "small"
    write_teacher(teacher, SMALL)
    write_tars(folder / "many", tars=10 * tars, samples=samples, size=(64, 48))
    print(
        f"\n{'process':<32} {'1x MB':>9} {'10x MB':>9} {'ratio':>9} {'wanted':>9} {'B/sample':>9}"
    )
    found: dict[str, list[float]] = {"build": [], "train": []}
    for times, pattern in ((1, f"t-{{000..{tars - 1:03d}}}.tar"), (10, "*.tar")):
        data, cache = f"{folder}/many/{pattern}", folder / f"cache-{times}"
        found["build"].append(peak(build_work(teacher, data, cache)))
        found["train"].append(peak(train_work(cache, data, folder / f"run-{times}")))
    for name, (one, ten) in found.items():
        grown = 1e6 * (ten - one) / (9 * tars * samples)
        print(f"{name:<32} {one:>9.0f} {ten:>9.0f} {ten / one:>9.3f} {'<= 1.05':>9} {grown:>9.0f}")
    print(f"\n1x: {tars} tars of {samples} samples; a small teacher and the tests' student")


if __name__ == "__main__":
    main()
