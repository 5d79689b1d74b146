"""Comparing identities: what decided the bytes of shards, value by value."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from shared.errors import MismatchError
from shared.strict import shown


def compare(
    name: str,
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    advice: str,
    accept: Collection[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """Refuse two identities that differ.

    Args:
        name: whose identity `found` is, for the message.
        advice: what to do about it.
        accept: values, or sections of them, that may differ: `template`, `tokenizer`.

    Returns:
        What differs and is accepted: its name, the value found, the value expected.

    Raises:
        MismatchError: names up to three differing values, both sides.
    """
    if found == expected:
        return {}
    unequal, accepted = [], {}
    for path, there, here in differences(found, expected):
        if any(path == one or path.startswith(f"{one}.") for one in accept):
            accepted[path] = (there, here)
        else:
            unequal.append((path, there, here))
    if unequal:
        text = "; ".join(
            f"{path}: {shown(there)} there, {shown(here)} here" for path, there, here in unequal[:3]
        )
        more = f" (and {len(unequal) - 3} more)" if len(unequal) > 3 else ""
        raise MismatchError(f"{name} does not fit: {text}{more}. {advice}")
    return accepted


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, value in one, value in other) for every leaf that differs."""
    for key in sorted({*one, *other}):
        ours, theirs = one.get(key), other.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from differences(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs or (key in one) != (key in other):
            yield f"{prefix}{key}", ours, theirs
