"""Plans: small JSON files that say which shards a build set out to make.

They are for people, who want to know how far a build is; no reader of samples needs them. A plan's
name is the digest of its content.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from shared.errors import CacheError, DamagedError, printable
from shared.inside import list_inside, read_inside
from shared.readable import reading
from shared.record import NAME
from shared.sealed import MAX_BYTES, parse_json

PLANS = "plans"
"Their folder in a cache."
_FILE = re.compile(r"[0-9a-f]{16}\.json")


class _Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    shards: tuple[str, ...]
    "Names of the shards, sorted."

    def __post_init__(self) -> None:
        if not all(map(NAME.fullmatch, self.shards)):
            raise ValueError("a name in it is no shard's")


def plan_files(root: Path) -> list[str]:
    """Files of the plans, relative to the cache; whatever else lies beside them is passed over.

    Raises:
        DamagedError: the folder of the plans is a link.
        CacheError: it cannot be read.
    """
    with reading(root, CacheError):
        names = [entry.name for entry in list_inside(root, PLANS)]
    return [f"{PLANS}/{name}" for name in names if _FILE.fullmatch(name)]


def plan_file(shards: Sequence[str]) -> tuple[str, bytes]:
    """Path in the cache and content of the plan to build `shards`; its name is its digest."""
    content = json.dumps({"shards": sorted(shards)}, separators=(",", ":")).encode()
    return f"{PLANS}/{hashlib.sha256(content).hexdigest()[:16]}.json", content


def read_plan(root: Path, file: str) -> tuple[str, ...]:
    """The shards that a build set out to make.

    Raises:
        DamagedError: not a plan, or not as it was written.
        CacheError: it cannot be read.
    """
    with reading(root / file, CacheError):
        content = read_inside(root, file, MAX_BYTES)
    try:
        plan = msgspec.convert(parse_json(content), _Plan)
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"{root / file}: not a plan ({printable(str(error), most=300)}); it may be deleted"
        ) from error
    if plan_file(plan.shards) != (file, content):
        raise DamagedError(
            f"{root / file}: not a plan (its name is not its digest); it may be deleted"
        )
    return plan.shards
