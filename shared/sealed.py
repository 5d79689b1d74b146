"""JSON files that carry the digest of their own content, read with bounds.

The digest stands in front and covers every byte behind it, so that anyone can check it without
knowing how numbers or keys are written: `tail -c +78 RECORD | sha256sum`.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.bounds import check_containers
from shared.errors import MismatchError

MAX_BYTES = 16 * 2**20
"Largest record or plan. Reading one takes up to 30 times as much memory (`make malicious`)."
_HEAD = re.compile(rb'\{"sha256":"([0-9a-f]{64})",')


def seal(values: Mapping[str, Any]) -> bytes:
    """JSON that begins with the sha256 of all that follows that digest."""
    rest = json.dumps(values, ensure_ascii=False, separators=(",", ":"))[1:]
    # Halves of characters (a tar may name members so) have no UTF-8, but JSON's escape.
    content = rest.encode("utf-8", "backslashreplace")
    return b'{"sha256":"%s",%s' % (hashlib.sha256(content).hexdigest().encode(), content)


def unseal(path: Path, content: bytes) -> bytes:
    """The JSON in a record file, without the digest in front of it.

    Args:
        path: named in the message of a MismatchError.

    Raises:
        ValueError: not as it was written, or more lists and objects than a record needs.
        MismatchError: a record of a draft that had no digest in front.
    """
    head = _HEAD.match(content)
    if head is None:
        if content.startswith(b'{"format":'):
            raise MismatchError(
                f"{path}: a record without its own sha256 there, one that begins with it here; it "
                "is of an older draft of format 1: build the cache again"
            )
        raise ValueError("does not begin with its sha256")
    rest = content[head.end() :]
    found = hashlib.sha256(rest).hexdigest()
    if found != head[1].decode():
        raise ValueError(f"has sha256 {found[:12]}, but says {head[1].decode()[:12]}")
    json_text = b"{" + rest
    check_containers(json_text)
    return json_text


def parse_json(content: bytes) -> Any:
    """JSON of a stranger, in UTF-8: no key twice, no NaN, no more lists and objects than a record
    needs.

    Raises:
        ValueError: not such JSON.
        RecursionError: nested too deep.
    """
    check_containers(content)
    return json.loads(content.decode(), object_pairs_hook=_distinct, parse_constant=_no_constant)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return values


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")
