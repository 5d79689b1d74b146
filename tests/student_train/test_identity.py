"""What a cache was made from is compared before a build goes on, before training, and in a merge.

The table is in tests/identity.py.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.identity import (
    CASES,
    NOT_THERE,
    Case,
    Named,
    World,
    continue_build,
    first_world,
    image_mean,
    merge,
    start_training,
    tar_of_equal_size,
    template,
    train,
    vocabulary,
)
from tests.support import error_line

PLACES: list[tuple[str, Callable[[World], str]]] = [
    ("build", continue_build), ("train", start_training), ("merge", merge),
]  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> World:
    return first_world(tmp_path_factory.mktemp("first"))


@pytest.fixture
def world(first: World, tmp_path: Path) -> World:
    """The first world, free to put its changed files into a folder of its own."""
    return dataclasses.replace(first, folder=tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_change_is_refused_by_name_and_what_changes_nothing_is_accepted(
    case: Case, world: World
) -> None:
    changed = case.change(world)
    for place, meet in PLACES:
        expected: Named = getattr(case, place)
        if expected != NOT_THERE:
            found = meet(changed)
            assert (expected or "accepted") in found, place


def test_a_mismatch_is_accepted_by_name_and_written_down(world: World) -> None:
    changed = dataclasses.replace(image_mean(world), recipe={"template": "plain"})

    result = train(
        changed, world.folder / "run", "--accept-mismatch", "template,image_processor.settings"
    )

    assert result.exit_code == 0, result.output
    for file in ("run.json", "export/distillation.json"):
        written = json.loads((world.folder / "run" / file).read_text())["accepted_mismatches"]
        assert written["template"] == {"cache": "v1", "run": "plain"}
        assert written["image_processor.settings.image_mean"]["run"] == [0.5, 0.5, 0.5]
        assert len(written) == 2


def test_a_run_without_mismatch_says_that_there_was_none(world: World) -> None:
    assert json.loads((world.run / "run.json").read_text())["accepted_mismatches"] == {}


def test_one_accepted_mismatch_lets_no_other_through(world: World) -> None:
    changed = dataclasses.replace(vocabulary(world), recipe={"template": "plain"})

    line = error_line(train(changed, world.folder / "run", "--accept-mismatch", "template"))

    assert "tokenizer.vocab_sha256" in line
    assert "template" not in line.replace("--accept-mismatch", "")


def test_another_tar_is_accepted_by_name(world: World) -> None:
    changed = tar_of_equal_size(world)

    assert train(changed, world.folder / "run", "--accept-mismatch", "tar").exit_code == 0


@pytest.mark.parametrize("name", ["templ", "template", ""])
def test_a_name_of_nothing_that_differs_is_refused(name: str, world: World) -> None:
    line = error_line(train(world, world.folder / "run", "--accept-mismatch", name))

    assert f"--accept-mismatch {name}: nothing of that name differs" in line


def test_a_resumed_run_must_accept_the_same(world: World) -> None:
    changed = template(world)
    accepted = ("--accept-mismatch", "template")
    assert train(changed, world.folder / "run", *accepted).exit_code == 0

    assert "template: 'v1' there" in error_line(train(changed, world.folder / "run", "--resume"))
    assert train(changed, world.folder / "run", "--resume", *accepted).exit_code == 0
