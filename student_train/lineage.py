"""Which code a run was made by."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_DISTRIBUTION = "align-kd-cache"


def code_identity(root: Path = _ROOT) -> dict[str, Any]:
    """Version of this package, and the git revision if `root` is a checkout.

    The revision ends with `-dirty` if tracked files were changed.
    """
    return {"version": _version(), "revision": _revision(root)}


def _version() -> str | None:
    try:
        return version(_DISTRIBUTION)
    except PackageNotFoundError:  # run from a folder that is not installed
        return None


def _revision(root: Path) -> str | None:
    # Asked first: an installed copy may lie inside a checkout of something else.
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no git here, or one that does not trust it
        return None
    return done.stdout.strip() or None
