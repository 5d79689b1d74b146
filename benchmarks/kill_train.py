"""Kill train-student at random moments, resume it, and compare with a run that was left alone.

    python -m benchmarks.kill_train --kills 20

Trains the tests' reference student on the CPU, sends SIGKILL after random waits (start-up and
checkpoints included) and prints one row per kill. Ends with 1 if a weight, an adapter or a logged
value differs in a single bit.
"""

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from safetensors.torch import load_file

from tests.student_train.support import (
    SPEC,
    arguments,
    command_line,
    environment,
    exported,
    loss_lines,
    mixed_samples,
    num_lines,
    run_process,
    write_recipe,
)
from tests.support import build, write_tar


@click.command()
@click.option("--kills", default=20, show_default=True, help="Processes to kill.")
@click.option("--steps", default=400, show_default=True, help="Steps of the run.")
@click.option("--seed", default=0, show_default=True, help="Of the waits.")
def main(kills: int, steps: int, seed: int) -> None:
    """Kill, resume, compare."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tar = write_tar(folder / "mixed.tar", *mixed_samples(24))
        build(folder / "cache", tar, SPEC)
        recipe = write_recipe(
            folder / "recipe.yaml", global_batch=4, micro_batch=2, epochs=steps, max_steps=steps,
            log_every=3, save_every=5,
        )  # fmt: skip

        def command(out: Path, *options: str) -> list[str]:
            given = arguments(out, [tar], folder / "cache", recipe, *options)
            return command_line(*given)

        start, rest = _run_alone(command(folder / "alone"), folder / "alone")
        print(f"left alone: {start:.1f} s to the first log line, {rest:.1f} s to the end")
        chance = random.Random(seed)
        waits = [chance.uniform(0, 1.5) * rest / kills for _ in range(kills)]
        print(f"{'kill':>4} {'after s':>8} {'checkpoint':>14} {'lines':>6} {'half written':>13}")
        killed = _kill(command, folder / "killed", waits, chance)
        run_process(command(folder / "killed", "--resume"))
        unequal = _differences(folder / "killed", folder / "alone")
    print(
        f"{killed} kills; {'bit-identical' if not unequal else 'DIFFERENT: ' + ', '.join(unequal)}"
    )
    sys.exit(1 if unequal else 0)


def _run_alone(command: list[str], out: Path) -> tuple[float, float]:
    """Seconds to the first log line, and from there to the end."""
    begun = time.monotonic()
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not num_lines(out):
            time.sleep(0.01)
        start = time.monotonic() - begun
        if process.wait():
            sys.exit("the run that was left alone failed")
    return start, time.monotonic() - begun - start


def _kill(
    command: Callable[..., list[str]], out: Path, waits: Sequence[float], chance: random.Random
) -> int:
    for number, wait in enumerate(waits):
        process = subprocess.Popen(
            command(out, "--resume"), env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            if chance.random() > 0.2:  # one kill in five may fall into start-up
                _wait_for_training(process, out)
            process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        else:
            return number  # it came to its end
        checkpoints = sorted((out / "checkpoints").glob("step-*"))
        whole = [path.name for path in checkpoints if path.suffix != ".partial"]
        half = [path.name for path in checkpoints if path.suffix == ".partial"]
        print(
            f"{number + 1:>4} {wait:>8.2f} {whole[-1] if whole else '-':>14} "
            f"{num_lines(out):>6} {'yes' if half else 'no':>13}"
        )
    return len(waits)


def _wait_for_training(process: "subprocess.Popen[bytes]", out: Path) -> None:
    """Until the process has opened its log, which it does right before its first step."""
    log, begun = out / "log.jsonl", time.time()
    while process.poll() is None and not (log.exists() and log.stat().st_mtime > begun):
        time.sleep(0.005)


def _differences(one: Path, other: Path) -> list[str]:
    ours, theirs = exported(one), exported(other)
    unequal = [name for name in theirs if not ours[name].equal(theirs[name])]
    ours, theirs = (load_file(run / "adapters.safetensors") for run in (one, other))
    unequal += [f"adapters {name}" for name in theirs if not ours[name].equal(theirs[name])]
    return unequal + ([] if loss_lines(one) == loss_lines(other) else ["log.jsonl"])


if __name__ == "__main__":
    main()
