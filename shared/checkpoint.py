"""Model folders in the published layout: find tensors by name, read only the named ones, write.

A folder is a local directory or a Hugging Face hub id. Weights are one file or many, `.safetensors`
or `.bin`. A `.bin` is a pickle, so it is read with `weights_only=True`, which builds tensors and
refuses everything else.
"""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shared.errors import CheckpointError
from shared.progress import progress
from shared.readable import check_readable, is_file, is_folder, reading

SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"Small files of a model folder: what is read of it besides weights."
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class ModelFolder:
    """A model folder; nothing is read before it is asked for."""

    def __init__(self, name: str) -> None:
        """`name`: a local folder, else a hub id (only the files that are asked for are fetched).

        Raises:
            CheckpointError: neither a folder nor a hub id that can be reached, no config.json, or
                a folder that may not be searched.
        """
        self.name = name
        self._fetch: Callable[[str], Path] | None = None
        path = Path(name)
        if not is_folder(path, CheckpointError):
            path = self._open_hub(name)
        self.path = path
        "The local folder (for a hub id: its snapshot) that holds the small files."
        if not is_file(path / "config.json", CheckpointError):
            raise CheckpointError(f"{name}: no config.json; expected a model folder")

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine, not a snapshot of the hub."""
        return self._fetch is None

    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        return _read_json(self.path / "config.json")

    def tensor_files(self) -> dict[str, str]:
        """Tensor name -> name of the file that holds it.

        Raises:
            CheckpointError: no weights in the folder.
        """
        names = [name for single in _WEIGHTS for name in (f"{single}.index.json", single)]
        # What was fetched before comes first: it needs no network, which would be asked in vain for
        # the names that a model does not have.
        for name in sorted(names, key=lambda name: not is_file(self.path / name, CheckpointError)):
            found = self._find(name)
            if found and name.endswith(".json"):
                return _weight_map(found)
            if found:
                return dict.fromkeys(self._names_in(name), name)
        raise CheckpointError(
            f"{self.name}: no weights ({', '.join(_WEIGHTS)} or their .index.json)"
        )

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors; only the files that hold them are opened.

        Raises:
            CheckpointError: a tensor or its file is missing or damaged.
        """
        wanted, files = list(names), self.tensor_files()
        missing = sorted(set(wanted) - set(files))
        if missing:
            raise CheckpointError(
                f"{self.name}: {len(missing)} tensors are missing: {_few(missing)}"
            )
        by_file: dict[str, list[str]] = {}
        for name in wanted:
            by_file.setdefault(files[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        with progress(f"read {self.path.name}", "tensor", total=len(wanted)) as bar:
            for file, inside in by_file.items():
                for name, tensor in self._read_file(file, inside):
                    tensors[name] = tensor
                    bar.update()
        return tensors

    def _open_hub(self, name: str) -> Path:
        # Not os.path-like: "org/name" and nothing more.
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise CheckpointError(f"{name}: no such folder; expected one, or a hub id as org/name")
        from huggingface_hub import hf_hub_download, snapshot_download

        self._fetch = lambda file: Path(hf_hub_download(name, file))
        try:
            return Path(snapshot_download(name, allow_patterns=list(SETTINGS)))
        except _hub_errors() as error:
            raise CheckpointError(
                f"{name}: no such local folder, and the hub cannot be reached or has no such model"
            ) from error

    def _find(self, file: str) -> Path | None:
        path = self.path / file
        if is_file(path, CheckpointError):
            return path
        if self._fetch is None:
            return None
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return self._fetch(file)
        except _hub_errors() as error:
            # The second of these says that the hub was not asked.
            if isinstance(error, EntryNotFoundError) and not isinstance(
                error, LocalEntryNotFoundError
            ):
                return None
            raise CheckpointError(
                f"{self.name}: {file} cannot be fetched from the hub ({error}); run it "
                "again, what has been fetched stays"
            ) from error

    def _names_in(self, file: str) -> list[str]:
        path = self._find(file)
        assert path is not None
        if file.endswith(".safetensors"):
            with _open_safetensors(path) as opened:
                return list(opened.keys())
        return list(_load_bin(path))

    def _read_file(self, file: str, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        path = self._find(file)
        if path is None:
            raise CheckpointError(f"{self.name}: {file} is missing; it holds {_few(names)}")
        if file.endswith(".safetensors"):
            with _open_safetensors(path) as opened:
                _check_inside(path, names, opened.keys())
                yield from ((name, opened.get_tensor(name)) for name in names)
            return
        loaded = _load_bin(path)
        _check_inside(path, names, loaded)
        yield from ((name, loaded[name]) for name in names)


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], form: Literal["bin", "safetensors"]
) -> None:
    """`pytorch_model.bin` (what the original code and llama.cpp read) or `model.safetensors`.

    Args:
        form: `bin` or `safetensors`. A `.bin` holds plain tensors only.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if form == "safetensors":
        from safetensors.torch import save_file

        path = folder / "model.safetensors"
        save_file(plain, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner can read
    else:
        torch.save(plain, folder / "pytorch_model.bin")


def copy_settings(source: Path, folder: Path, *, leave_out: tuple[str, ...] = ()) -> None:
    """The small files of a model folder, so that a written model is complete."""
    for name in SETTINGS:
        if name not in leave_out and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and values; order and file format do not matter."""
    digest = hashlib.sha256()
    total = sum(tensor.nbytes for tensor in tensors.values())
    with progress("digest of the weights", "B", total=total) as bar:
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            bar.update(tensor.nbytes)
    return digest.hexdigest()


def _open_safetensors(path: Path) -> Any:
    check_readable(path, CheckpointError)
    try:
        with reading(path, CheckpointError):
            return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or not safetensors ({error})") from error


def _load_bin(path: Path) -> dict[str, Tensor]:
    check_readable(path, CheckpointError)
    try:
        with reading(path, CheckpointError):
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: damaged, or more than tensors in it ({reason})") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds {type(loaded).__name__}, expected named tensors")
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}


def _weight_map(index: Path) -> dict[str, str]:
    files = _read_json(index).get("weight_map")
    # Names only: an index must not lead out of its folder.
    if not isinstance(files, dict) or any(Path(str(file)).name != file for file in files.values()):
        raise CheckpointError(f"{index}: expected a weight_map of tensor names to file names")
    return files


def _check_inside(path: Path, names: Iterable[str], inside: Iterable[str]) -> None:
    missing = sorted(set(names) - set(inside))
    if missing:
        raise CheckpointError(f"{path}: the index says that it holds {_few(missing)}; it does not")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with reading(path, CheckpointError):
            values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return values


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's library raises: its own errors, its HTTP library's, and a full disk's."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    return EntryNotFoundError, ValueError, *HfHubHTTPError.__bases__


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
