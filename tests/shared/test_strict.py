"""Specs and records are built strictly: nothing is guessed, nothing is ignored."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from shared.errors import ConfigError
from shared.strict import parse, read_yaml


@dataclass(frozen=True, kw_only=True)
class Hull:
    metres: float

    def __post_init__(self) -> None:
        if self.metres <= 0:
            raise ValueError(f"metres must be > 0, found {self.metres}")


@dataclass(frozen=True, kw_only=True)
class Boat:
    name: str
    hull: Hull
    masts: int = 1
    color: Literal["red", "blue"] = "red"
    crew: tuple[str, ...] = ()
    depths: dict[int, float] = field(default_factory=dict)
    flag: str | None = None
    afloat: bool = True


GOOD: dict[str, Any] = {"name": "Ann", "hull": {"metres": 9}}


def test_values_become_the_types_of_their_fields() -> None:
    given = {**GOOD, "crew": ["Bo"], "depths": {"3": "2e-5"}, "flag": None, "masts": 2}

    found = parse(Boat, given, "boat")

    assert found == Boat(name="Ann", hull=Hull(metres=9.0), crew=("Bo",), depths={3: 2e-5}, masts=2)
    assert type(found.hull.metres) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mast": 1}, "boat: unknown key 'mast'; nearest known: 'masts'"),
        ({"hull": {"meters": 9}}, "boat: hull: unknown key 'meters'; nearest known: 'metres'"),
        ({5: 1}, "unknown key 5"),
        ({"hull": {}}, "boat: hull: missing key 'metres'"),
        ({"hull": None}, "boat: hull: expected a mapping of keys, found None"),
        ({"hull": {"metres": -1}}, "boat: hull: metres must be > 0, found -1.0"),
        ({"hull": {"metres": True}}, "boat: hull: metres: expected float, found True"),
        ({"hull": {"metres": "long"}}, "expected float, found 'long'"),
        ({"masts": 1.5}, "boat: masts: expected int, found 1.5"),
        ({"masts": True}, "boat: masts: expected int, found True"),
        ({"masts": "1.5"}, "boat: masts: expected int, found '1.5'"),
        ({"name": 5}, "boat: name: expected str, found 5"),
        ({"color": "green"}, "boat: color: 'green' is not one of red, blue"),
        ({"color": ["red"]}, "is not one of red, blue"),
        ({"crew": "Bo"}, "boat: crew: expected a list, found 'Bo'"),
        ({"crew": ["Bo", 5]}, "boat: crew: expected str, found 5"),
        ({"depths": [1]}, "boat: depths: expected a mapping, found [1]"),
        ({"depths": {"x": 1}}, "boat: depths: expected int, found 'x'"),
        ({"flag": 5}, "boat: flag: expected str, found 5"),
        ({"afloat": "yes"}, "boat: afloat: expected bool, found 'yes'"),
        ({"afloat": 1}, "boat: afloat: expected bool, found 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(change: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(Boat, {**GOOD, **change}, "boat")

    assert message in str(error.value)


@pytest.mark.parametrize("values", [None, 5, "boat", [GOOD]])
def test_what_is_no_mapping_is_refused(values: object) -> None:
    with pytest.raises(ConfigError, match="boat: expected a mapping of keys"):
        parse(Boat, values, "boat")


def test_yaml_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"a: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]")

    with pytest.raises(ConfigError, match="is not YAML"):
        read_yaml(path)

    assert not (tmp_path / "made").exists()


def test_a_yaml_error_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: [1,\nb: }\n")

    with pytest.raises(ConfigError) as error:
        read_yaml(path)

    assert "\n" not in str(error.value)


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("template: v1\noptim:\n  lr: 1\n  warmup: 0\n  lr: 2\n")

    with pytest.raises(ConfigError, match=r"key 'lr' stands twice.*line 5"):
        read_yaml(path)


def test_a_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}\n")

    assert read_yaml(path)["more"] == {"a": 1, "b": 3}
