"""A checkpoint and an export are on the disk before they have their names."""

from pathlib import Path

import pytest

from tests.student_train.support import train
from tests.support import Push


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
