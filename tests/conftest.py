"""Settings and fixtures for all tests: one thread, repeatable properties, one real cache."""

import os
from pathlib import Path

# Before the hook below: what a module that it instruments is the first to import is compiled anew.
import accelerate  # noqa: F401
import hypothesis
import pytest
import torch
import transformers.models.clip.modeling_clip
import transformers.models.llama.modeling_llama  # noqa: F401
import webdataset  # noqa: F401
import zarr  # noqa: F401
from jaxtyping import install_import_hook

# Modules that state shapes are held to them. In the others the types are mypy's to check: doing it
# while they run would take a sixth of the tests' time.
_ROOT = Path(__file__).parents[1]
_SOURCES = [
    path
    for package in ("shared", "cache_builder", "student_train")
    for path in (_ROOT / package).glob("*.py")
    if "from jaxtyping import" in path.read_text()
]
_WITH_SHAPES = [f"{path.parent.name}.{path.stem}" for path in _SOURCES]
install_import_hook(_WITH_SHAPES, "beartype.beartype")

from cache_builder.pack import pack
from shared.cache import Cache, open_cache
from shared.tokenizer import Tokenizer, load_tokenizer
from tests.support import FULL, REFERENCE, TEACHER, Push, build

torch.set_num_threads(1)  # the models are tiny; more threads only wait for one another

# Derandomised: a run of CI says something about the change, not about luck.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The reference teacher's tokenizer."""
    return load_tokenizer(TEACHER)


@pytest.fixture(scope="session")
def packed_tars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The reference data set in two tars of two samples."""
    out = tmp_path_factory.mktemp("tars")
    pack(REFERENCE / "annotations.json", REFERENCE / "images", out, samples_per_tar=2, prefix="ref")
    return sorted(out.glob("*.tar"))


@pytest.fixture(scope="session")
def cache_path(packed_tars: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the reference data set with every signal. Read only: copy it to change it."""
    out = tmp_path_factory.mktemp("cache") / "cache"
    build(out, packed_tars, FULL)
    return out


@pytest.fixture
def cache(cache_path: Path) -> Cache:
    """The opened cache."""
    return open_cache(cache_path)


@pytest.fixture
def pushes(monkeypatch: pytest.MonkeyPatch) -> list[Push]:
    """What was pushed to the disk, and the names in it, or in its folder, then."""
    found: list[Push] = []
    push = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        found.append((path, set(os.listdir(path if path.is_dir() else path.parent))))
        push(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return found
