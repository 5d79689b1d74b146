"""From what a person types for tars, brace ranges and globs, to their paths."""

import glob
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import braceexpand

from shared.errors import InputError
from shared.readable import NO_URLS, is_file, is_folder, is_url


def expand_tars(patterns: Sequence[str]) -> list[Path]:
    """Paths from brace ranges (`{000..099}.tar`) and globs, each once, in order.

    Raises:
        InputError: a tar is missing, a URL, a folder or in a folder that may not be searched, a
            glob matches nothing, two tars share a name, or the braces do not pair.
    """
    paths: list[Path] = []
    for pattern in patterns:
        if is_url(pattern):
            raise InputError(f"{pattern} {NO_URLS}")
        for text in _expand_braces(pattern):
            # A folder may have [ and ] in its name.
            found = sorted(glob.glob(text)) if glob.has_magic(text) else [text]
            if not found and not os.path.isfile(text):
                raise _no_match(text)
            found = found or [text]
            paths += [Path(path) for path in found]
    paths = list(dict.fromkeys(paths))
    names: dict[str, Path] = {}
    for path in paths:
        if is_folder(path, InputError):
            raise InputError(f"{path}: is a folder; expected tars, as '{path}/*.tar'")
        if not is_file(path, InputError):
            raise InputError(f"{path}: no such tar (expanded from {' '.join(patterns)})")
        if (twin := names.setdefault(path.name, path)) != path:
            raise InputError(f"{path} and {twin} share a name; shards are named after their tars")
    return paths


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:  # UnbalancedBracesError, which its stubs do not know
        raise InputError(f"{pattern}: not a brace range ({error})") from error


def _no_match(pattern: str) -> InputError:
    """Why a glob found nothing: glob itself passes over folders that it may not list."""
    parts = Path(pattern).parts
    folder = Path(*takewhile(lambda part: not glob.has_magic(part), parts))
    try:
        os.scandir(folder).close()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        return InputError(f"{folder}: cannot be read ({error.strerror}), for {pattern}")
    return InputError(f"{pattern}: matches no tar")
