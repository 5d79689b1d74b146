"""A checkpoint and an export are on the disk before they have their names."""

import os
from pathlib import Path

import pytest

from tests.student_train.support import train

Push = tuple[Path, set[str]]


@pytest.fixture
def pushes(monkeypatch: pytest.MonkeyPatch) -> list[Push]:
    """What was pushed to the disk, and the names that were in its folder, or in itself, then."""
    found: list[Push] = []
    push = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        found.append((path, set(os.listdir(path if path.is_dir() else path.parent))))
        push(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


@pytest.mark.parametrize("name", ["checkpoints/step-00000001", "export"])
def test_what_has_its_final_name_is_on_the_disk_with_all_names_that_lead_to_it(
    name: str, tars: list[Path], tmp_path: Path, pushes: list[Push]
) -> None:
    run = tmp_path / "run"
    assert train(run, tars, None, max_steps=1).exit_code == 0
    final = run / name
    files = {path.relative_to(final) for path in final.rglob("*") if path.is_file()}

    named = min(
        number
        for number, (path, there) in enumerate(pushes)
        if path == final.parent and final.name in there
    )
    partial = final.with_name(f"{final.name}.partial")
    before = {path for path, _ in pushes[:named]}
    assert len(files) > 2
    assert {file for file in files if partial / file not in before} == set()
    assert partial in before
    # Every folder on the way, too.
    for folder in (final, *final.parents):
        if folder == run.parent:
            break
        assert any(path == folder.parent and folder.name in there for path, there in pushes), folder


def test_the_folder_of_checkpoints_is_on_the_disk_when_the_first_has_its_name(
    tars: list[Path], tmp_path: Path, pushes: list[Push]
) -> None:
    run = tmp_path / "run"

    assert train(run, tars, None, max_steps=1).exit_code == 0

    before = [there for path, there in pushes if path == run and "export" not in there]
    assert any("checkpoints" in there for there in before)
