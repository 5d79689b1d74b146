"""`train-student`: train a student, with a teacher cache or plainly supervised."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shared.console import (
    AS_JSON,
    DATA,
    FILE,
    FOLDER,
    VISION_TOWER,
    Command,
    configure_logging,
)
from shared.progress import IMPORTING, announced, is_main_process
from shared.stopping import Stopped, stop_on_sigterm

if TYPE_CHECKING:
    from student_train.loop import Outcome


class _Training(Command):
    interrupted = "checkpoints stay; the same command with --resume goes on from the last"


@click.command(cls=_Training, name="train-student")
@click.option(
    "--cache", type=FOLDER,
    help="Teacher cache made by build-cache. Without it: plain supervised training.",
)  # fmt: skip
@DATA
@click.option(
    "--student", required=True,
    help="MobileVLM V2 folder or hub id; or a Llama, which gets a fresh projector.",
)  # fmt: skip
@VISION_TOWER
@click.option(
    "--adapters", type=FILE, help="Adapters of an earlier stage (RUN/adapters.safetensors)."
)
@click.option("--out", required=True, type=FOLDER, help="The run: checkpoints, logs, export.")
@click.option(
    "--recipe", default="stage2", show_default=True,
    help="YAML file, or a shipped recipe: stage1, stage2.",
)  # fmt: skip
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="Change one value of the recipe, as in optim.lr=1e-4; docs/recipes.md has all keys. "
    "Repeatable.",
)  # fmt: skip
@click.option("--eval-data", multiple=True, help="Held-out tars, written like --data. Repeatable.")
@click.option(
    "--accept-mismatch", multiple=True, metavar="NAME[,NAME]",
    help="Train though this differs between cache and run: template, image_aspect, tokenizer, "
    "image_processor, vision_tokens, vocab_size, tar or probe, or a part of one, as the refusal "
    "names it. Kept in run.json and the export.",
)  # fmt: skip
@click.option(
    "--resume", is_flag=True,
    help="Continue the run in --out from its last checkpoint; begin it if there is none, so that "
    "a batch job can always say so.",
)  # fmt: skip
@click.option("--cpu", is_flag=True, help="Do not use a GPU even if there is one.")
@AS_JSON
def train_student(
    cache: Path | None, data: tuple[str, ...], student: str, vision_tower: str | None,
    adapters: Path | None, out: Path, recipe: str, settings: tuple[str, ...],
    eval_data: tuple[str, ...], accept_mismatch: tuple[str, ...], resume: bool, cpu: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Train a student on tars, with all losses of Align-KD if there is a cache.

    On several devices: torchrun --nproc_per_node N $(which train-student) ... . A run that was
    killed goes on with --resume as if nothing had happened. SIGTERM stops it after the step in
    work, with a checkpoint and exit code 0; an evaluation is finished before, but for the last one.
    The student ends up in OUT/export, in MobileVLM's published layout.
    """
    configure_logging(verbose=is_main_process())
    try:
        with stop_on_sigterm() as stop:
            with announced(IMPORTING):
                from student_train.config import load_recipe
                from student_train.setup import Inputs, run_training

            outcome = run_training(
                load_recipe(recipe, settings),
                Inputs(
                    data=data, eval_data=eval_data, student=student, vision_tower=vision_tower,
                    cache=cache, adapters=adapters,
                    accept=tuple(name for names in accept_mismatch for name in names.split(",")),
                ),
                out, resume=resume, cpu=cpu, stop=stop,
            )  # fmt: skip
    except Stopped:
        outcome = None
    if not is_main_process():
        return
    if outcome is None or outcome.stopped:
        _echo_stopped(out, outcome, as_json)
        return
    scores = outcome.scores
    if as_json:
        result = {
            "steps": outcome.steps,
            "seconds": round(outcome.seconds, 3),
            "eval_loss": scores and scores.loss,
            "exact_match": scores and scores.exact_match,
            "answers": scores and scores.answers,
        }
        click.echo(json.dumps(result))
        return
    click.echo(
        f"{out}: {outcome.steps} steps in {outcome.seconds:.0f} s, export in {out / 'export'}"
    )
    if scores is not None:
        match = scores.exact_match
        rate = (
            ""
            if match is None
            else f", exact match {100 * match:.2f} % of {scores.answers} answers"
        )
        click.echo(f"held out: loss {scores.loss:.4f} nats{rate}, {scores.skipped} skipped")


def _echo_stopped(out: Path, outcome: "Outcome | None", as_json: bool) -> None:
    """None: no step was made."""
    if as_json:
        click.echo(json.dumps({"stopped": True, "steps": outcome and outcome.steps}))
        return
    where = f" after step {outcome.steps} of {outcome.last_step}" if outcome else ""
    click.echo(
        f"{out}: stopped by SIGTERM{where}; the same command with --resume goes on from the last "
        "checkpoint, or begins if there is none"
    )
