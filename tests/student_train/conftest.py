"""A mixed data set of 24 samples in two tars, and its cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.cache import Cache, open_cache
from tests.student_train.support import SPEC, mixed_samples
from tests.support import build, write_tar


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """24 samples, a third text only, of many lengths."""
    folder = tmp_path_factory.mktemp("mixed")
    samples = mixed_samples(24)
    return [
        write_tar(folder / "mixed-0.tar", *samples[:14]),
        write_tar(folder / "mixed-1.tar", *samples[14:]),
    ]


@pytest.fixture(scope="session")
def full_path(tars: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tars' cache: every signal, exact, two layers."""
    out = tmp_path_factory.mktemp("full") / "cache"
    build(out, tars, SPEC)
    return out


@pytest.fixture(scope="session")
def full_cache(full_path: Path) -> Cache:
    """The opened cache."""
    return open_cache(full_path)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the number format of the first Accelerator of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
