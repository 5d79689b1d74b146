"""A run's folder: its settings, checkpoints, logs and export.

OUT/run.json                      recipe and identities; compared when the run is resumed. And what
                                  code made it, and of which adapters it began: not compared
OUT/skipped.jsonl                 samples that cannot be used, with their reason, as far as is known
                                  before the first step; absent if there are none
OUT/log.jsonl, OUT/tensorboard/   what happened, step by step
OUT/checkpoints/step-00000500/    everything that a resumed run needs (this run's own, not to be
                                  shared: accelerate stores random states as pickle), with a copy
                                  of run.json as lineage.json
OUT/export/                       the student in the published layout
OUT/adapters.safetensors          the adapters, for a next stage
OUT/lock                          locked by the run that goes on here
"""

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from shared.checkpoint import copy_settings, write_weights
from shared.durable import make_folder, put_file, sync_folder, sync_tree
from shared.errors import TrainingError
from shared.identity import differences
from shared.mobilevlm import MobileVLM
from shared.readable import is_file, reading
from shared.record import Skipped
from student_train.config import MAY_CHANGE
from student_train.student import Adapters

log = logging.getLogger(__name__)

SKIPPED = "skipped.jsonl"
"Name of the list of samples that cannot be used."
_RECORDED = ("code", "adapters")
"""Settings that are not compared on resuming: code may be updated, and which adapters a run began
with is part of `student_weights`."""


class RunFolder:
    """Where one run keeps what it makes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        "The folder."
        self._settings = path / "run.json"
        self._written: Mapping[str, Any] = {}

    def check_free(self) -> None:
        """Refuse a folder that holds a run.

        Raises:
            TrainingError: it does.
        """
        if self.exists:
            raise TrainingError(
                f"{self.path}: holds a run already; --resume continues it, another --out starts a "
                "new one"
            )

    @property
    def exists(self) -> bool:
        """Whether a run has begun here."""
        return is_file(self._settings, TrainingError)

    def read_settings(self) -> dict[str, Any]:
        """What `write_settings` wrote.

        Raises:
            TrainingError: it cannot be read.
        """
        try:
            return dict(json.loads(self._settings.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise TrainingError(
                f"{self._settings}: cannot be read ({error}); start anew in another --out"
            ) from error

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with a run that began with something else.

        Args:
            settings: recipe and identities of what the run uses.

        Raises:
            TrainingError: names up to three differing values, both sides.
        """
        if not self.exists:
            return
        changed = [
            f"{name} was {old!r} and is {new!r} now"
            for name, old, new in differences(self.read_settings(), settings)
            if name.removeprefix("recipe.") not in MAY_CHANGE
            and name.partition(".")[0] not in _RECORDED
        ]
        if changed:
            more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
            raise TrainingError(
                f"{self.path}: cannot be resumed: {'; '.join(changed[:3])}{more}; use what the run "
                "began with, or another --out"
            )

    def code_with(self, code: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Every code that the run was made by, in order, `code` being what goes on with it."""
        before = self.read_settings().get("code") if self.exists else None
        known = before if isinstance(before, list) else []
        return known if known and known[-1] == code else [*known, code]

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from training into the folder as long as the block runs.

        Raises:
            TrainingError: another one does, or the folder cannot be written.
        """
        with writing(self.path):
            make_folder(self.path)
            lock = (self.path / "lock").open("w")
        with lock:
            try:
                # lockf: a loader's processes, which outlive a kill by seconds, do not inherit it.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise TrainingError(
                    f"{self.path}: another process trains into it; wait for its end and --resume, "
                    "or take another --out"
                ) from error
            except OSError:  # some network mounts know no locks
                log.warning("%s: cannot be locked; do not train twice into it", self.path)
            yield

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """From now on the folder holds a run; checkpoints say the same."""
        self._written = settings
        put_file(self._settings, json.dumps(settings, indent=1).encode(), TrainingError)

    def write_skipped(self, skipped: Sequence[Skipped]) -> None:
        """A line for each: logs name the first of them only."""
        if skipped:
            lines = [json.dumps({"key": one.key, "reason": one.reason}) for one in skipped]
            content = "".join(f"{line}\n" for line in lines)
            put_file(self.path / SKIPPED, content.encode(), TrainingError)

    def newest_checkpoint(self) -> Path | None:
        """The last whole checkpoint."""
        found = self.checkpoints()
        return found[-1] if found else None

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first; one that was cut short has no final name."""
        return sorted((self.path / "checkpoints").glob("step-" + "[0-9]" * 8))

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of a step is to lie."""
        return self.path / "checkpoints" / f"step-{step:08d}"

    def commit_checkpoint(self, partial: Path, step: int) -> None:
        """Give a written checkpoint its lineage and final name."""
        (partial / "lineage.json").write_text(json.dumps(self._written, indent=1) + "\n")
        sync_tree(partial)
        partial.replace(self.checkpoint_path(step))
        for folder in (partial.parent, self.path):  # before older ones are deleted
            sync_folder(folder)

    def drop_checkpoints(self, keep: int) -> None:
        """Delete all but the newest, and halves."""
        for old in self.checkpoints()[:-keep]:
            old.replace(old.with_suffix(".partial"))  # what is deleted in part is no checkpoint
        for half in (self.path / "checkpoints").glob("*.partial"):
            try:
                shutil.rmtree(half)
            except OSError as error:
                log.warning("%s: cannot be deleted (%s)", half, error.strerror)

    def cut_log(self, step: int) -> None:
        """Drop what a run resumed at `step` does again: later steps, evaluations from it on."""
        file = self.path / "log.jsonl"
        if file.is_file():
            with reading(file, TrainingError):
                lines = file.read_text(errors="replace").splitlines()  # a power cut leaves anything
            kept = [line for line in lines if _is_kept(line, step)]
            put_file(file, "".join(f"{line}\n" for line in kept).encode(), TrainingError)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Of a block that writes a file or folder of a run: what to do if it cannot.

    Raises:
        TrainingError: names the path and the reason, as a full disk.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save, safetensors
        why = isinstance(error, OSError) and error.strerror
        raise TrainingError(
            f"{path}: cannot be written ({why or ' '.join(str(error).split())[:200]}); whole "
            "checkpoints stay, run it again with --resume once that is mended"
        ) from error


@contextmanager
def whole_or_gone(folder: Path) -> Iterator[None]:
    """Of a block that writes `folder`: if it cannot, the space is given back.

    Raises:
        TrainingError: as `writing`.
    """
    try:
        with writing(folder):
            yield
    except TrainingError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def export_student(
    model: MobileVLM,
    source: Path,
    folder: Path,
    *,
    form: Literal["bin", "safetensors"],
    lineage: Mapping[str, Any],
) -> None:
    """Write the student in the published layout: names, keys and config fields.

    Args:
        source: the folder that the student was loaded from; its tokenizer goes along.
        form: `bin` or `safetensors`.
        lineage: what the student was trained with, written beside it as `distillation.json`.

    Raises:
        TrainingError: it cannot be written.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with whole_or_gone(partial):
        partial.mkdir(parents=True)
        copy_settings(source, partial, leave_out=("config.json",))
        config = dict(model.config.published)
        tower = str(config["mm_vision_tower"])
        if "/" not in tower:  # no hub id: the tower's settings travel inside the folder
            (partial / tower).mkdir()
            copy_settings(model.config.tower_folder, partial / tower)
        write_weights(partial, model.published_state(), form)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (partial / "distillation.json").write_text(json.dumps(lineage, indent=1) + "\n")
        sync_tree(partial)  # an export says that a run is finished
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
        sync_folder(folder.parent)


def file_sha256(path: Path) -> str:
    """Digest of a file, hexadecimal.

    Raises:
        TrainingError: it cannot be read.
    """
    with reading(path, TrainingError), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_adapters(adapters: Adapters, path: Path) -> None:
    """Adapters as safetensors, for a next stage.

    Raises:
        TrainingError: they cannot be written.
    """
    state = {name: tensor.cpu().contiguous() for name, tensor in adapters.state_dict().items()}
    put_file(path, save(state), TrainingError)


def load_adapters(adapters: Adapters, path: Path) -> None:
    """Adapters of an earlier stage.

    Raises:
        TrainingError: they do not fit this teacher and student.
    """
    try:
        state = load_file(path)
        adapters.load_state_dict(state)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path}: cannot be read ({error})") from error
    except RuntimeError as error:
        found = {name: list(tensor.shape) for name, tensor in state.items()}
        wanted = {name: list(tensor.shape) for name, tensor in adapters.state_dict().items()}
        raise TrainingError(f"{path}: adapters {found} do not fit, expected {wanted}") from error


def _is_kept(line: str, step: int) -> bool:
    try:
        values = json.loads(line)
        done = float(values["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False  # a line that was cut short
    return done < step or (done == step and "eval_loss" not in values)
