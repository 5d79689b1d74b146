"""From names on a command line to a run: load, compare, train, export."""

import gc
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from shared.cache import Cache, open_cache
from shared.checkpoint import ModelFolder, weights_digest
from shared.errors import ConfigError, MismatchError
from shared.identity import compare
from shared.images import ImageProcessor
from shared.mobilevlm import NUM_VISION, MobileVLM, load_model
from shared.progress import announced
from shared.spec import canonical_digest
from shared.stopping import StopRequest
from shared.tar_names import expand_tars
from shared.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, tokenizer_identity
from student_train.config import Recipe
from student_train.evaluate import HeldOutSet
from student_train.lineage import code_identity
from student_train.loop import Outcome, make_accelerator, num_steps, train
from student_train.probe import check_probe
from student_train.runs import (
    SKIPPED,
    RunFolder,
    export_student,
    file_sha256,
    load_adapters,
    save_adapters,
)
from student_train.student import AlignedStudent, TeacherShape
from student_train.training_set import TrainingSet, load_training_set

log = logging.getLogger(__name__)

Mismatches = dict[str, tuple[Any, Any]]
"Name of what differs -> the cache's value, the run's value."
_ACCEPT = "name it in --accept-mismatch, which the run and its export will say."


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run is made from, as named by a person."""

    data: Sequence[str]
    "Training tars: paths, brace ranges, globs."
    eval_data: Sequence[str]
    "Held-out tars; may be empty."
    student: str
    "MobileVLM or Llama folder, or hub id."
    vision_tower: str | None
    "CLIP folder or hub id, if the student's config does not say."
    cache: Path | None
    "Teacher cache; None for plain supervised training."
    adapters: Path | None
    "Adapters of an earlier stage."
    accept: Sequence[str] = ()
    "What may differ between cache and run, by the names that a refusal gives."


def run_training(
    recipe: Recipe, inputs: Inputs, out: Path, *, resume: bool, cpu: bool, stop: StopRequest
) -> Outcome:
    """One run, from start or checkpoint to export.

    Raises:
        Stopped: `stop` was asked while no step was made.
        ProjectError: anything that does not fit; both values are named.
    """
    accelerator = make_accelerator(recipe, cpu=cpu)
    run = RunFolder(out)
    if not resume:
        run.check_free()
    elif not run.exists and accelerator.is_main_process:
        log.warning("%s: no run to resume here, a new one begins", out)
    torch.manual_seed(recipe.seed)
    folder = ModelFolder(inputs.student)
    cache = open_cache(inputs.cache) if inputs.cache else None
    model = load_model(folder, inputs.vision_tower)
    tokenizer = load_tokenizer(folder.path)
    check_vocabulary(tokenizer, int(model.llm.config.vocab_size), folder.name)
    processor = ImageProcessor(model.config.tower_folder, recipe.image_aspect)
    accepted = {}
    if cache is not None:
        accepted = check_fit(cache, recipe, tokenizer, processor, model, inputs)
        accepted |= check_probe(
            cache, recipe, tokenizer, processor, accept=inputs.accept, accepted=accepted
        )
    student = make_student(model, recipe, cache, inputs.adapters)
    tars = expand_tars(inputs.data)
    training_set = load_training_set(tars, recipe, tokenizer, processor, cache)
    if cache is not None:
        other = check_tars(cache, tars, training_set.tars, inputs.accept)
        training_set = replace(training_set, accepted_tars=frozenset(map(_tar_of, other)))
        accepted |= other
    refuse_unused(inputs.accept, accepted)
    held_out = _held_out(inputs, recipe, tokenizer, processor)
    num_steps(training_set, accelerator.num_processes)  # refused before the run leaves a trace
    settings = {
        **_identities(recipe, student, cache, training_set, inputs, accepted),
        "code": run.code_with(code_identity()),
    }
    run.check_settings(settings)
    checkpoint = run.newest_checkpoint()
    # All processes have looked before one of them writes.
    refuse_disagreement(settings, checkpoint)
    _log_start(recipe, training_set, held_out, cache, accelerator)
    with run.claimed() if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            if not resume:
                run.check_free()  # another run may have begun meanwhile
            run.write_settings(settings)
            run.write_skipped(training_set.skipped)
        outcome = train(student, training_set, held_out, run, accelerator, checkpoint, stop)
        if accelerator.is_main_process and not outcome.stopped:
            _export(student, folder, run, recipe, settings)
        accelerator.wait_for_everyone()  # the export is written: NCCL may not be left by some alone
    _leave(accelerator)
    return outcome


def _identities(
    recipe: Recipe,
    student: AlignedStudent,
    cache: Cache | None,
    training_set: TrainingSet,
    inputs: Inputs,
    accepted: Mismatches,
) -> dict[str, Any]:
    """What decides the outcome: a run that is resumed has to begin with the same."""
    return {
        "recipe": recipe.to_dict(),
        "student_weights": weights_digest(student.state_dict()),
        "cache": cache_identity(cache) if cache else None,
        "data": training_set.identity,
        "accepted_mismatches": {
            name: {"cache": there, "run": here} for name, (there, here) in accepted.items()
        },
        "adapters": {"given_sha256": inputs.adapters and file_sha256(inputs.adapters)},
    }


def _log_start(
    recipe: Recipe,
    training_set: TrainingSet,
    held_out: HeldOutSet | None,
    cache: Cache | None,
    accelerator: Accelerator,
) -> None:
    log.info(
        "samples=%d skipped=%d processes=%d device=%s cache=%s", len(training_set),
        len(training_set.skipped), accelerator.num_processes, accelerator.device,
        cache.root if cache else "none: plain training, no teacher",
    )  # fmt: skip
    if recipe.eval_every and held_out is None:
        log.warning("eval_every=%d, but no --eval-data: nothing is evaluated", recipe.eval_every)
    skipped, more = training_set.skipped[:20], training_set.skipped[20:]
    for sample in skipped:
        log.warning("skipped=%s reason=%s", sample.key, sample.reason)
    if more:
        log.warning("skipped %d more: all are in --out's %s", len(more), SKIPPED)


def refuse_disagreement(settings: Mapping[str, Any], checkpoint: Path | None) -> None:
    """Compare what the processes of a run have found, each for itself; waits for all of them.

    Samples are shared out by their number: two processes with different sets would take some twice
    and leave others out.

    Raises:
        MismatchError: both values are named.
    """
    found = {**settings, "checkpoint": checkpoint and checkpoint.name}
    first, *others = gather_object([found])
    for number, other in enumerate(others, 1):
        compare(
            f"process {number} of the run", other, first,
            "Start it again when nothing is being built into the cache; all processes must see the "
            "same cache, tars and --out.",
        )  # fmt: skip


def check_fit(
    cache: Cache,
    recipe: Recipe,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    model: MobileVLM,
    inputs: Inputs,
    *,
    or_else: str = _ACCEPT,
) -> Mismatches:
    """Refuse a cache and a student that see different sequences or pixels.

    Args:
        or_else: the last piece of advice of the refusal.

    Returns:
        What differs and is accepted.

    Raises:
        MismatchError: template, image aspect, tokenizer, image processor, vision tokens or (for the
            KL) vocabulary; both values are named.
    """
    teacher = cache.identity["teacher"]
    there = {
        "template": cache.spec.template,
        "image_aspect": cache.spec.image_aspect,
        "tokenizer": cache.identity["tokenizer"],
        "image_processor": _without_aspect(cache.identity["image_processor"]),
        "vision_tokens": teacher["vision_tokens"],
    }
    here = {
        "template": recipe.template,
        "image_aspect": recipe.image_aspect,
        "tokenizer": tokenizer_identity(tokenizer),
        "image_processor": _without_aspect(processor.identity),
        "vision_tokens": NUM_VISION,
    }
    if recipe.loss.kl and cache.spec.logprobs is not None:
        there["vocab_size"] = teacher["vocab_size"]
        here["vocab_size"] = int(model.llm.config.vocab_size)
    advice = (
        f"The student ({inputs.student}) must see exactly what the teacher saw: change the recipe, "
        f"build a cache for this student, or {or_else}"
    )
    found = compare(f"cache {cache.root}", there, here, advice, inputs.accept)
    if there.get("vocab_size", 0) > here.get("vocab_size", 0):
        raise MismatchError(
            f"cache {cache.root}: the teacher's vocabulary has {there['vocab_size']} tokens, the "
            f"student's {here['vocab_size']}: some of the likeliest may have no logit there. Train "
            "with --set loss.kl=0"
        )
    return found


def check_tars(
    cache: Cache, tars: Sequence[Path], indexes: Mapping[str, str], accept: Sequence[str]
) -> Mismatches:
    """Refuse tars that have the name of one of the cache's, but not its size and members.

    Reading all of them to compare their content would take hours. Tars under other names are let
    through: samples may have been packed anew.

    Args:
        indexes: tar name -> digest of its index.

    Returns:
        What differs and is accepted.

    Raises:
        MismatchError: names both sizes or digests.
    """
    recorded = {record.tar.name: record.tar for record in cache.records.values()}
    known = [tar for tar in tars if tar.name in recorded]
    there = {
        tar.name: {
            "size": recorded[tar.name].size, "index_sha256": recorded[tar.name].index_sha256
        }
        for tar in known
    }  # fmt: skip
    here = {
        tar.name: {"size": tar.stat().st_size, "index_sha256": indexes[tar.name]} for tar in known
    }
    advice = f"Train on the tars that the cache was built from, or {_ACCEPT}"
    return compare(f"cache {cache.root}", {"tar": there}, {"tar": here}, advice, accept)


def _tar_of(name: str) -> str:
    """The tar of an accepted `tar.NAME.size` or `tar.NAME.index_sha256`."""
    return name.removeprefix("tar.").rpartition(".")[0]


def refuse_unused(accept: Sequence[str], accepted: Mismatches) -> None:
    """Refuse to accept what does not differ: a name that was misspelt.

    Raises:
        ConfigError: names it and what does differ.
    """
    for name in accept:
        if not any(path == name or path.startswith(f"{name}.") for path in accepted):
            raise ConfigError(
                f"--accept-mismatch {name}: nothing of that name differs between cache and run "
                f"(what does: {', '.join(accepted) or 'nothing'})"
            )


def _without_aspect(processor: Mapping[str, Any]) -> dict[str, Any]:
    """The aspect has a line of its own."""
    return {name: value for name, value in processor.items() if name != "aspect"}


def cache_identity(cache: Cache) -> dict[str, Any]:
    """What names a cache in the runs that use it: its identity and the shards' data."""
    files = {name: {f: s.sha256 for f, s in r.files.items()} for name, r in cache.records.items()}
    return {"digest": canonical_digest(files), "samples": len(cache), **cache.identity}


def make_student(
    model: MobileVLM, recipe: Recipe, cache: Cache | None, adapters: Path | None
) -> AlignedStudent:
    """The student with its adapters, fresh ones from torch's seed where no file is named, set up to
    save memory if the recipe says so.

    Raises:
        ConfigError: adapters without a cache, or a loss that cache or student cannot give.
        TrainingError: adapters that do not fit.
    """
    if recipe.gradient_checkpointing:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    if cache is None:
        if adapters is not None:
            raise ConfigError(
                "--adapters needs --cache: without a teacher there is nothing to adapt"
            )
        return AlignedStudent(model, recipe.loss, train_tower=recipe.train_tower)
    student = AlignedStudent(
        model, recipe.loss, teacher=TeacherShape.of(cache.identity), spec=cache.spec,
        train_tower=recipe.train_tower,
    )  # fmt: skip
    if adapters is not None and student.adapters is not None:
        load_adapters(student.adapters, adapters)
    return student


def _held_out(
    inputs: Inputs, recipe: Recipe, tokenizer: Tokenizer, processor: ImageProcessor
) -> HeldOutSet | None:
    if not inputs.eval_data:
        return None
    return HeldOutSet(
        expand_tars(inputs.eval_data),
        template=recipe.template,
        max_tokens=recipe.max_tokens,
        tokenizer=tokenizer,
        processor=processor,
        limit=recipe.eval_samples,
        max_new_tokens=recipe.max_new_tokens,
    )


def _export(
    student: AlignedStudent,
    folder: ModelFolder,
    run: RunFolder,
    recipe: Recipe,
    settings: Mapping[str, Any],
) -> None:
    saved = None
    if student.adapters is not None:
        path = run.path / "adapters.safetensors"
        save_adapters(student.adapters, path)
        saved = file_sha256(path)
    lineage = {**settings, "adapters": {**settings["adapters"], "saved_sha256": saved}}
    export = run.path / "export"
    with announced(f"writing {export}"):
        export_student(
            student.model, folder.path, export, form=recipe.export_weights, lineage=lineage
        )
    log.info("exported=%s", export)


def _leave(accelerator: Accelerator) -> None:
    """End the group of processes.

    In this order: a data-parallel wrapper (a cycle of references) that is the last to let go of the
    group holds Python's lock meanwhile, and gloo's thread may be waiting for it: neither would go
    on.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
