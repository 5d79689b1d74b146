"""Building frozen dataclasses from YAML, strictly.

An unknown key is an error that names the nearest known one; a value of the wrong type is an error
that names the key, the value and the type. Nothing is guessed, nothing is ignored.
"""

import dataclasses
import difflib
import math
import re
import reprlib
import types
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from shared.errors import ConfigError
from shared.readable import is_file, reading

T = TypeVar("T")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 120
_SHORT.maxlevel = 3


def find_yaml(name: str | Path, folder: Traversable, what: str) -> Path:
    """A YAML file by its path, or by the name of one that ships in `folder`.

    Raises:
        ConfigError: it is neither; those that ship are named.
    """
    path = Path(name)
    if is_file(path, ConfigError):
        return path
    yamls = (one for one in folder.iterdir() if one.name.endswith(".yaml"))
    shipped = {one.name.removesuffix(".yaml"): one for one in yamls}
    if str(name) not in shipped:
        raise ConfigError(
            f"{name}: no such {what} file, nor a shipped one ({', '.join(sorted(shipped))})"
        )
    return Path(str(shipped[str(name)]))


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping from a file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, has a key twice, or is not a mapping.
    """
    try:
        with reading(path, ConfigError):
            values = yaml_value(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(values).__name__}")
    return values


def yaml_value(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: it is not YAML, or a key stands twice.
    """
    return yaml.load(text, _DistinctKeys)


class _DistinctKeys(yaml.SafeLoader):
    """YAML's own rule, which its library does not keep: a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:  # as written: merging (`<<`) may override
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"key {key.value!r} stands twice",
                    key.start_mark,
                )  # fmt: skip
            seen.add(key.value)
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        return values


def parse(cls: type[T], values: object, where: str) -> T:
    """An instance of the dataclass `cls` from a mapping; `where` names it in messages.

    Raises:
        ConfigError: unknown or missing key, wrong type, or a value that `__post_init__` refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys, found {shown(values)}")
    _check_keys(values, {field.name: field for field in dataclasses.fields(cls)}, where)  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    arguments = {
        key: convert(hints[key], value, f"{where}: {key}") for key, value in values.items()
    }
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_keys(
    values: Mapping[Any, Any], fields: "dict[str, dataclasses.Field[object]]", where: str
) -> None:
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {shown(key)}{nearest(str(key)[:100], fields)}")
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        raise ConfigError(f"{where}: missing key {missing[0]!r}")


def shown(value: object) -> str:
    """`value` as messages show it: its repr, cut where it would be long or deep."""
    return _SHORT.repr(value)


def nearest(key: str, known: Mapping[str, object] | list[str]) -> str:
    """The end of a message about an unknown name: what it could have been."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return f"; nearest known: {close[0]!r} (known: {', '.join(known)})" if close else ""


def convert(hint: Any, value: object, where: str) -> Any:
    """`value` as the type `hint`, or a ConfigError that names `where`."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, where)  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = [argument for argument in arguments if argument is not type(None)]
        return convert(hint, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(
                f"{where}: {shown(value)} is not one of {', '.join(map(str, arguments))}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, found {shown(value)}")
        return tuple(convert(arguments[0], item, where) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, found {shown(value)}")
        return {
            _key(arguments[0], key, where): convert(
                arguments[1], item, f"{where}: {str(key)[:100]}"
            )
            for key, item in value.items()
        }
    return _scalar(hint, value, where)


def _key(hint: type, key: object, where: str) -> object:
    if type(key) is hint:
        return key
    if hint is int and isinstance(key, str) and re.fullmatch("-?[0-9]{1,18}", key):
        return int(key)  # JSON has only text keys, so a layer map comes back as text
    return convert(hint, key, where)


def _scalar(hint: type, value: object, where: str) -> object:
    if hint is float:
        # YAML reads "2e-5" (no dot) as text; people write it all the time.
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                number = math.nan
            if math.isfinite(number):
                return number
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: expected {hint.__name__}, found {shown(value)}")


def _required(field: "dataclasses.Field[object]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
