"""A run from the command line: what it leaves behind, and that a killed one goes on as if nothing
had happened.
"""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from shared.cache import Cache
from shared.checkpoint import ModelFolder
from shared.errors import ConfigError, MismatchError
from shared.mobilevlm import MobileVLM, load_model
from student_train.cli import train_student
from student_train.evaluate import HeldOutSet, Scores
from student_train.lineage import code_identity
from student_train.loop import make_accelerator, make_optimizer
from student_train.runs import RunFolder, export_student, load_adapters, save_adapters
from student_train.setup import refuse_disagreement
from student_train.student import TERMS, AlignedStudent
from student_train.watch import Watch
from tests.processes import context, run_two, start
from tests.student_train.support import (
    SPEC,
    STUDENT,
    aligned,
    arguments,
    command_line,
    environment,
    exported,
    log_lines,
    loss_lines,
    num_lines,
    recipe,
    run_process,
    said,
    signal_when,
    train,
    train_in_process,
    training_set,
    write_recipe,
)
from tests.support import CLIP, build, error_line, full_disk, teacher_copy

# 12 steps; log lines, evaluations and checkpoints fall on different steps.
RUN: dict[str, Any] = {
    "global_batch": 4, "micro_batch": 2, "epochs": 2, "log_every": 2, "save_every": 3,
    "eval_every": 5, "eval_samples": 4, "max_new_tokens": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def orphan_cache(tars: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose teacher is gone."""
    folder = tmp_path_factory.mktemp("orphan")
    teacher = teacher_copy(folder / "teacher")
    build(folder / "cache", tars, SPEC, teacher)
    shutil.rmtree(teacher)
    return folder / "cache"


@pytest.fixture(scope="module")
def undisturbed(
    tars: list[Path], orphan_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run, by a process of its own."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    result = train_in_process(run_arguments(out, tars, orphan_cache), out.with_name("log"))
    assert result["steps"] == 12
    return out


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Sums in the order of the processes that these tests start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_arguments(out: Path, tars: list[Path], cache: Path | None, *more: str) -> list[str]:
    """What stands behind `train-student` for the run."""
    file = write_recipe(out.with_suffix(".yaml"), **RUN)
    return arguments(out, tars, cache, file, "--eval-data", tars[1], "--json", *more)


def resume(out: Path, tars: list[Path], cache: Path) -> None:
    """Go on in this process."""
    result = train(out, tars, cache, "--eval-data", tars[1], "--resume", **RUN)
    assert result.exit_code == 0, result.output


def assert_same_run(found: Path, expected: Path) -> None:
    """Bit-identical weights, adapters, and log values that the clock does not decide."""
    ours, theirs = exported(found), exported(expected)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    ours, theirs = (load_file(run / "adapters.safetensors") for run in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert loss_lines(found) == loss_lines(expected)


# -- several processes ---------------------------------------------------------------------------


def test_processes_that_would_each_train_alone_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without LOCAL_RANK accelerate does not join, as it does not under torchrun without a GPU.
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(ConfigError, match="2 processes were started, but each would train on its"):
        make_accelerator(recipe(), cpu=False)


def test_processes_that_found_different_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"data": {"samples": 24}, "checkpoint": None}
    monkeypatch.setattr("student_train.setup.gather_object", lambda mine: [*mine, other])

    with pytest.raises(MismatchError, match=r"process 1 .* data.samples: 24 there, 16 here"):
        refuse_disagreement({"data": {"samples": 16}}, None)


# -- what a run leaves behind --------------------------------------------------------------------


def test_a_run_needs_no_teacher(undisturbed: Path, orphan_cache: Path) -> None:
    assert not (orphan_cache.parent / "teacher").exists()
    assert (undisturbed / "export" / "pytorch_model.bin").is_file()


def test_the_log_has_every_loss_term_and_every_evaluation(undisturbed: Path) -> None:
    lines = log_lines(undisturbed)
    steps = [line["step"] for line in lines if "loss" in line]
    evaluations = [line["step"] for line in lines if "eval_loss" in line]

    assert steps == [2, 4, 6, 8, 10, 12]
    assert evaluations == [5, 10, 12]
    for line in lines:
        if "loss" in line:
            assert {*TERMS, "loss", "grad_norm", "lr", "samples_per_second"} <= set(line)
        else:
            assert set(line) == {"step", "eval_loss", "eval_exact_match"}


@pytest.mark.usefixtures("_one_thread")
def test_a_log_line_holds_means_over_the_steps_since_the_last(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    train(tmp_path / "every", tars, orphan_cache, **{**RUN, "log_every": 1, "eval_every": None})
    each = [line for line in log_lines(tmp_path / "every") if "loss" in line]

    for line in (line for line in log_lines(undisturbed) if "loss" in line):
        pair = [other for other in each if line["step"] - 2 < other["step"] <= line["step"]]
        for name in ("loss", *TERMS, "grad_norm"):
            assert line[name] == pytest.approx(sum(p[name] for p in pair) / 2, rel=1e-6)


def test_tensorboard_has_every_loss_term(undisturbed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(undisturbed / "tensorboard"))
    board.Reload()

    assert {*TERMS, "loss", "lr", "grad_norm", "eval_loss"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("loss")] == [2, 4, 6, 8, 10, 12]


def test_only_the_newest_checkpoints_are_kept(undisturbed: Path) -> None:
    kept = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())

    assert kept == ["step-00000009", "step-00000012"]


def test_the_learning_rate_rises_then_falls_to_zero(tars: list[Path], tmp_path: Path) -> None:
    optim = {"lr": 1e-3, "warmup": 0.25}
    train(tmp_path / "run", tars, None, **{**RUN, "log_every": 1, "optim": optim})

    rates = [line["lr"] for line in log_lines(tmp_path / "run")]

    assert rates[:3] == sorted(rates[:3])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert max(rates) == pytest.approx(1e-3)
    assert 0 < rates[-1] < 1e-4


# -- export --------------------------------------------------------------------------------------


def test_the_export_has_the_published_files_names_and_settings(undisturbed: Path) -> None:
    export = undisturbed / "export"
    published = torch.load(STUDENT / "pytorch_model.bin", weights_only=True)

    assert {path.name for path in export.iterdir()} == {
        *(path.name for path in STUDENT.iterdir()), "distillation.json",
    }  # fmt: skip
    assert json.loads((export / "config.json").read_text()) == json.loads(
        (STUDENT / "config.json").read_text()
    )
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (export / name).read_bytes() == (STUDENT / name).read_bytes()
    assert {k: (t.shape, t.dtype) for k, t in exported(undisturbed).items()} == {
        k: (t.shape, t.dtype) for k, t in published.items()
    }
    assert any(".encoder.layers.2." in name for name in published)  # the tower's unused last layer


def test_the_export_has_new_weights_where_it_was_trained_and_the_old_ones_elsewhere(
    undisturbed: Path,
) -> None:
    before = torch.load(STUDENT / "pytorch_model.bin", weights_only=True)
    after = exported(undisturbed)

    same = {name for name in before if after[name].equal(before[name])}

    assert same == {name for name in before if ".vision_tower." in name}


def test_the_adapters_are_beside_the_export_and_not_in_it(undisturbed: Path) -> None:
    adapters = load_file(undisturbed / "adapters.safetensors")

    assert {name: list(t.shape) for name, t in adapters.items()} == {
        "attention.0.weight": [2, 4, 1, 1], "attention.0.bias": [2],
        "attention.1.weight": [2, 4, 1, 1], "attention.1.bias": [2],
        "vision.weight": [32, 64], "vision.bias": [32],
    }  # fmt: skip
    assert not any("adapter" in name or "attention." in name for name in exported(undisturbed))


def test_the_export_says_what_it_was_trained_with(undisturbed: Path) -> None:
    lineage = json.loads((undisturbed / "export" / "distillation.json").read_text())

    run = json.loads((undisturbed / "run.json").read_text())
    saved = hashlib.sha256((undisturbed / "adapters.safetensors").read_bytes()).hexdigest()
    adapters = {"given_sha256": None, "saved_sha256": saved}
    assert lineage == {**run, "adapters": adapters}
    (checkpoint, *_) = RunFolder(undisturbed).checkpoints()
    assert json.loads((checkpoint / "lineage.json").read_text()) == run
    assert lineage["code"] == [code_identity()]
    assert len(lineage["cache"]["digest"]) == 64
    assert lineage["recipe"] == recipe(**RUN).to_dict()
    assert lineage["cache"]["spec"]["attention"]["layers"] == [0, 1]


def test_code_is_named_by_version_and_revision_of_its_checkout(tmp_path: Path) -> None:
    assert code_identity(tmp_path)["revision"] is None
    (tmp_path / ".git").mkdir()  # of no use to git
    assert code_identity(tmp_path)["revision"] is None
    shutil.rmtree(tmp_path / ".git")
    (tmp_path / "file").write_text("one")
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)

    clean = code_identity(tmp_path)["revision"]
    (tmp_path / "file").write_text("two")

    assert re.fullmatch("[0-9a-f]{40}", clean)
    assert code_identity(tmp_path)["revision"] == f"{clean}-dirty"


def test_resume_begins_a_run_where_there_is_none_and_says_so(
    tars: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = train(tmp_path / "run", tars, None, "--resume", max_steps=1)

    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'run'}: no run to resume here, a new one begins" in caplog.text
    assert (tmp_path / "run" / "export" / "config.json").is_file()


@pytest.mark.usefixtures("_one_thread")
def test_other_code_may_resume_a_run_and_is_written_down_too(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    out = interrupted(undisturbed, tmp_path / "run")
    settings = json.loads((out / "run.json").read_text())
    old = {"version": "0.0.1", "revision": "0" * 40}
    (out / "run.json").write_text(json.dumps({**settings, "code": [old]}))

    resume(out, tars, orphan_cache)

    for file in ("run.json", "export/distillation.json", "checkpoints/step-00000012/lineage.json"):
        assert json.loads((out / file).read_text())["code"] == [old, code_identity()]


def logits(model: MobileVLM, samples: Any) -> torch.Tensor:
    batch = samples[[0, 1, 2, 3]]
    with torch.no_grad():
        vision = model.encode_images(batch.pixels)
        embeds = model.embed(batch.sequences.ids, batch.sequences.vision_mask, vision)
        found: torch.Tensor = model.llm(inputs_embeds=embeds).logits
    return found


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_the_exported_student_is_the_one_in_memory(
    form: str, tars: list[Path], tmp_path: Path
) -> None:
    model = aligned(recipe(), None).model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    samples = training_set(tars, recipe(), None)

    export_student(model, STUDENT, tmp_path / "export", form=form, lineage={})
    again = load_model(ModelFolder(str(tmp_path / "export")), str(CLIP)).eval()

    assert (tmp_path / "export" / "pytorch_model.bin").exists() == (form == "bin")
    assert (tmp_path / "export" / "model.safetensors").exists() == (form == "safetensors")
    here, there = logits(model, samples), logits(again, samples)
    assert float((here - there).abs().max() / here.abs().max()) < 1e-5
    assert again.passthrough.keys() == model.passthrough.keys()
    assert len(model.passthrough) > 0


def test_an_export_replaces_an_older_one_as_a_whole(tmp_path: Path) -> None:
    model = aligned(recipe(), None).model
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "stale.bin").write_text("old")
    (tmp_path / "export.partial").mkdir()
    (tmp_path / "export.partial" / "stale.bin").write_text("half")

    export_student(model, STUDENT, tmp_path / "export", form="bin", lineage={})

    assert not (tmp_path / "export" / "stale.bin").exists()
    assert not (tmp_path / "export.partial").exists()


# -- killed and resumed --------------------------------------------------------------------------


def test_a_run_killed_at_three_random_points_ends_as_if_it_had_not_been(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    chance, out = random.Random(0), tmp_path / "run"
    partials = out / "checkpoints"
    lines = chance.sample(range(2, 6), 2)
    points: list[Callable[[], bool]] = [
        lambda: num_lines(out) >= min(lines),
        lambda: any(partials.glob("*.partial")),  # while a checkpoint is being written
        lambda: num_lines(out) >= max(lines) + 1,
    ]
    given, log = run_arguments(out, tars, orphan_cache), tmp_path / "log"

    for due in points:
        # Resuming cuts the log, so that only what this process adds can be due.
        code = signal_when(given, due, signal.SIGKILL, log)
        assert code == -signal.SIGKILL, "it ended before it could be killed"
        given = run_arguments(out, tars, orphan_cache, "--resume")
    assert not (out / "export").exists()
    train_in_process(given, log)

    assert_same_run(out, undisturbed)


@pytest.mark.usefixtures("_one_thread")
def test_sigterm_stops_a_run_after_the_step_in_work_and_resuming_ends_as_if_it_had_not_been(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    """Its worker processes get the signal too, as from a scheduler that stops a job."""
    out, log = tmp_path / "run", tmp_path / "log"
    given = run_arguments(out, tars, orphan_cache, "--set", "workers=2")

    code = signal_when(given, lambda: num_lines(out) >= 1, signal.SIGTERM, log)

    assert code == 0
    (last,) = RunFolder(out).checkpoints()[-1:]
    step = int(last.name.removeprefix("step-"))
    assert 2 <= step < 12
    assert said(log) == {"stopped": True, "steps": step}
    assert not (out / "export").exists()
    resume(out, tars, orphan_cache)
    assert_same_run(out, undisturbed)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("step", [5, 12])
def test_a_stop_comes_before_an_evaluation_that_is_due_and_resuming_makes_it(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, step: int,
) -> None:  # fmt: skip
    out, counted = tmp_path / "run", Watch.step

    def counted_and_asked(watch: Watch, number: int, *given: Any) -> None:
        counted(watch, number, *given)
        if number == step:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "step", counted_and_asked)
        result = train(out, tars, orphan_cache, "--eval-data", tars[1], **RUN)

    assert result.exit_code == 0, result.output
    assert f"stopped by SIGTERM after step {step} of 12" in result.stdout
    assert not [line for line in log_lines(out) if line["step"] == step and "eval_loss" in line]
    resume(out, tars, orphan_cache)
    assert_same_run(out, undisturbed)


def test_sigterm_before_the_first_step_says_so_in_one_line(
    tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("student_train.setup.load_model", asked)

    result = train(tmp_path / "run", tars, None, max_steps=1)

    assert result.exit_code == 0
    assert result.stdout == (
        f"{tmp_path / 'run'}: stopped by SIGTERM; the same command with --resume goes on from the "
        "last checkpoint, or begins if there is none\n"
    )


def interrupted(undisturbed: Path, out: Path) -> Path:
    """The run as a kill after step 11 leaves it: checkpoint 9 whole, lines up to step 10."""
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "export")
    (out / "adapters.safetensors").unlink()
    last = out / "checkpoints" / "step-00000012"
    last.rename(last.with_suffix(".partial"))
    (last.with_suffix(".partial") / "optimizer.bin").write_bytes(b"half")
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:-2]) + '{"step": 1')
    return out


@pytest.mark.usefixtures("_one_thread")
def test_a_half_written_checkpoint_and_a_half_written_line_are_as_if_they_were_not(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    out = interrupted(undisturbed, tmp_path / "run")
    (out / "checkpoints" / "step-00000010.partial").mkdir()  # of a stop that was killed

    resume(out, tars, orphan_cache)

    assert_same_run(out, undisturbed)
    assert [path.name for path in RunFolder(out).checkpoints()] == [
        "step-00000009",
        "step-00000012",
    ]
    assert not any((out / "checkpoints").glob("*.partial"))


def test_a_log_that_a_power_cut_filled_with_anything_is_cut_where_it_is_whole(
    tmp_path: Path,
) -> None:
    whole = b'{"step": 1, "loss": 2.0}\n'
    rest = (b"\xff\xfe\x00", b'{"step": 1' + b"0" * 400 + b"}", b"[" * 10**5, b'{"step": 1')
    (tmp_path / "log.jsonl").write_bytes(whole + b"\n".join(rest))

    RunFolder(tmp_path).cut_log(1)

    assert (tmp_path / "log.jsonl").read_bytes() == whole


@pytest.mark.usefixtures("_one_thread")
def test_a_run_killed_while_exporting_exports_again(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    (out / "export").rename(out / "export.partial")
    (out / "export.partial" / "config.json").unlink()

    resume(out, tars, orphan_cache)

    assert_same_run(out, undisturbed)


@pytest.mark.usefixtures("_one_thread")
def test_a_run_killed_in_its_last_evaluation_has_its_last_checkpoint_and_evaluates_again(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOutSet, "score", out_of_memory_at(3))
        with pytest.raises(MemoryError):
            train(out, tars, orphan_cache, "--eval-data", tars[1], **RUN)
    assert RunFolder(out).checkpoints()[-1].name == "step-00000012"
    assert not (out / "export").exists()

    resume(out, tars, orphan_cache)

    assert_same_run(out, undisturbed)


def test_an_evaluation_that_fails_costs_no_step(
    tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    out, often = tmp_path / "run", {**RUN, "eval_every": 3, "max_steps": 6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOutSet, "score", out_of_memory_at(1))
        with pytest.raises(MemoryError):
            train(out, tars, orphan_cache, "--eval-data", tars[1], **often)
    assert [path.name for path in RunFolder(out).checkpoints()] == ["step-00000003"]

    done = train(out, tars, orphan_cache, "--eval-data", tars[1], "--resume", **often)

    assert done.exit_code == 0, done.output
    assert [line["step"] for line in log_lines(out) if "eval_loss" in line] == [3, 6]


def out_of_memory_at(call: int) -> Callable[..., Scores]:
    """`HeldOutSet.score` that fails when it is called for the nth time."""
    score, calls = HeldOutSet.score, itertools.count(1)

    def scored(*given: Any, **options: Any) -> Scores:
        if next(calls) == call:
            raise MemoryError
        return score(*given, **options)

    return scored


def test_a_batch_that_the_device_cannot_hold_is_one_line(
    tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("student_train.student.AlignedStudent.forward", too_much)

    line = error_line(train(tmp_path / "run", tars, None, **RUN))

    assert "step 1: micro-batches of 2 need more memory than cpu has; --set micro_batch" in line


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(
    tars: list[Path], orphan_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(student: AlignedStudent, *given: Any) -> torch.optim.AdamW:
        calls = itertools.count(1)
        weight = next(p for p in student.parameters() if p.requires_grad)
        # Two micro-batches a step: in the third one.
        weight.register_hook(lambda grad: grad * torch.nan if next(calls) == 5 else None)
        return make_optimizer(student, *given)

    monkeypatch.setattr("student_train.loop.make_optimizer", poisoned)

    line = error_line(train(tmp_path / "run", tars, orphan_cache, **{**RUN, "save_every": 1}))

    assert "the loss or its gradient is not finite (loss=" in line
    assert "grad_norm=nan" in line
    newest = RunFolder(tmp_path / "run").newest_checkpoint()
    assert newest is not None
    weights = load_file(newest / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_gives_its_space_back(
    tars: list[Path], tmp_path: Path
) -> None:
    with full_disk(100_000):
        result = train(tmp_path / "run", tars, None, **RUN)

    line = error_line(result)
    assert "step-00000003.partial: cannot be written (" in line
    assert "whole checkpoints stay, run it again with --resume" in line
    assert not [*tmp_path.glob("run/**/*.partial")]


def test_a_checkpoint_that_cannot_be_read_is_one_line(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    newest = RunFolder(out).checkpoints()[-1]
    for name in ("model.safetensors", "optimizer.bin", "progress.json"):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[: len(whole) // 2])

        line = error_line(train(out, tars, orphan_cache, "--eval-data", tars[1], "--resume", **RUN))

        assert f"{newest}: cannot be read (" in line
        assert "delete it: --resume goes on from the one before" in line
        (newest / name).write_bytes(whole)


def test_two_runs_do_not_train_into_one_folder(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    claimed = context().Event()
    other = start(claim, out, claimed, log=tmp_path / "log")
    assert claimed.wait(60)

    result = train(out, tars, orphan_cache, "--eval-data", tars[1], "--resume", **RUN)

    other.kill()

    assert f"{out}: another process trains into it" in error_line(result)


def claim(out: Path, claimed: Event) -> None:
    with RunFolder(out).claimed():
        claimed.set()
        signal.pause()


def test_a_held_out_loss_that_is_not_finite_exports_nothing(
    tars: list[Path], tmp_path: Path
) -> None:
    options = {**RUN, "max_steps": 1, "optim": {"lr": 1e30, "warmup": 0.0}}

    result = train(tmp_path / "run", tars, None, "--eval-data", tars[1], **options)

    assert "step 1: the held-out loss is nan, nothing is exported" in error_line(result)
    assert not (tmp_path / "run" / "export").exists()


def test_sigterm_in_the_last_evaluation_says_which_step_is_saved(
    tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(HeldOutSet, "score", asked)
    once = {**RUN, "eval_every": 12}

    result = train(tmp_path / "run", tars, None, "--eval-data", tars[1], "--json", **once)

    assert json.loads(result.stdout) == {"stopped": True, "steps": 12}
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.usefixtures("_one_thread")
def test_an_export_that_cannot_be_written_is_one_line_and_is_made_by_a_resumed_run(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    shutil.rmtree(out / "export")
    with full_disk(100_000):
        result = train(out, tars, orphan_cache, "--eval-data", tars[1], "--resume", **RUN)

    assert "export.partial: cannot be written (" in error_line(result)
    assert not [*out.glob("*.partial")]
    resume(out, tars, orphan_cache)
    assert_same_run(out, undisturbed)


def test_settings_of_accelerate_divide_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")

    assert make_accelerator(recipe(), cpu=True).gradient_accumulation_steps == 1


def test_an_accelerate_that_shards_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)

    with pytest.raises(ConfigError, match="set up for FSDP, but this trains data-parallel only"):
        make_accelerator(recipe(), cpu=True)


@pytest.mark.usefixtures("_one_thread")
def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    out = interrupted(undisturbed, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")

    resume(out, tars, orphan_cache)

    assert_same_run(out, undisturbed)


@pytest.mark.usefixtures("_one_thread")
def test_what_is_only_watched_may_change_when_a_run_is_resumed(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    out = interrupted(undisturbed, tmp_path / "run")

    result = train(
        out, tars, orphan_cache, "--resume", "--set", "workers=1", "--set", "log_every=1",
        "--set", "eval_every=null", **RUN,
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    ours, theirs = exported(out), exported(undisturbed)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_two_processes_make_one_run(
    undisturbed: Path, tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    """Both look at the folder before one writes; one log, one export, and near the same weights."""
    out, script = tmp_path / "run", tmp_path / "train.py"
    _, _, code, *given = command_line(*run_arguments(out, tars, orphan_cache))
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    stdout = run_process([*torchrun, "--nproc_per_node", "2", str(script), *given])

    assert json.loads(stdout)["steps"] == 12
    for ours, theirs in zip(loss_lines(out), loss_lines(undisturbed), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_all_processes_of_a_run_stop_after_one_step_if_one_is_asked(
    tars: list[Path], orphan_cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = run_arguments(out, tars, orphan_cache)
    log = run_two(train_and_ask_one, out, given, folder=tmp_path)

    last = RunFolder(out).checkpoints()[-1]
    assert said(log) == {"stopped": True, "steps": int(last.name.removeprefix("step-"))}
    assert (last / "random_states_1.pkl").is_file()


def train_and_ask_one(out: Path, given: list[str]) -> None:
    def ask() -> None:
        while not num_lines(out):  # a line: both processes are at work
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes on what a scheduler sent to all

    if os.environ["RANK"] == "1":
        threading.Thread(target=ask, daemon=True).start()
    train_student(given)


def test_all_processes_stop_in_the_last_evaluation_if_one_is_asked_there(
    tars: list[Path], tmp_path: Path
) -> None:
    """One is at work, the other waits for its scores and can hear no signal meanwhile."""
    given = run_arguments(tmp_path / "run", tars, None)
    log = run_two(train_and_ask_one_in_its_last_evaluation, given, folder=tmp_path)

    assert said(log) == {"stopped": True, "steps": 12}
    assert not (tmp_path / "run" / "export").exists()


def train_and_ask_one_in_its_last_evaluation(given: list[str]) -> None:
    score, calls = HeldOutSet.score, itertools.count(1)

    def slow(*given: Any, **options: Any) -> Scores:
        if os.environ["RANK"] == "1" and next(calls) == 3:  # after those of steps 5 and 10
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOutSet, "score", slow)
        train_student(given)


# -- from stage to stage -------------------------------------------------------------------------


def test_stage_two_goes_on_with_student_and_adapters_of_stage_one(
    tars: list[Path], full_cache: Cache, packed_tars: list[Path], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    build(plain, packed_tars, {**SPEC, "template": "plain", "image_aspect": "square"})
    one = tmp_path / "one"
    result = train(
        one, packed_tars, plain, template="plain", image_aspect="square", global_batch=2,
        micro_batch=2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output

    def adapters(out: Path, *options: object) -> dict[str, torch.Tensor]:
        result = train(
            out, tars, full_cache.root, "--student", one / "export", *options, max_steps=1,
            optim={"lr": 1e-12, "adapter_lr": 1e-12},
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        return load_file(out / "adapters.safetensors")

    first = load_file(one / "adapters.safetensors")
    carried = adapters(tmp_path / "two", "--adapters", one / "adapters.safetensors")
    fresh = adapters(tmp_path / "fresh")

    for name in first:
        torch.testing.assert_close(carried[name], first[name], atol=1e-9, rtol=1e-6)
    assert not all(torch.allclose(fresh[name], first[name], atol=1e-6) for name in first)
    before, after, none = (
        json.loads((tmp_path / stage / "export" / "distillation.json").read_text())["adapters"]
        for stage in ("one", "two", "fresh")
    )
    assert after["given_sha256"] == before["saved_sha256"]
    assert none["given_sha256"] is None


def test_adapters_come_back_as_they_were_saved(full_cache: Cache, tmp_path: Path) -> None:
    one, other = (aligned(recipe(), full_cache, seed=seed).adapters for seed in (0, 1))
    assert one is not None
    assert other is not None

    save_adapters(one, tmp_path / "adapters.safetensors")
    load_adapters(other, tmp_path / "adapters.safetensors")

    assert all(t.equal(other.state_dict()[name]) for name, t in one.state_dict().items())


def test_a_damaged_cache_is_named_in_one_line_even_by_worker_processes(
    tars: list[Path], full_path: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(full_path, tmp_path / "cache"))
    for file in cache.glob("data/*/vision_tokens/c/0/0/0"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(bytes(content))
    file = write_recipe(tmp_path / "recipe.yaml", workers=2)

    done = subprocess.run(
        command_line(*arguments(tmp_path / "run", tars, cache, file)),
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Error: " in done.stderr.splitlines()[-1]
    assert "vision_tokens" in done.stderr.splitlines()[-1]
    assert "build-cache" in done.stderr.splitlines()[-1]
    assert done.stdout == ""
