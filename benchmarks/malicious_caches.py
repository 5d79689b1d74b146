"""Forge caches in every way that we know, open them, and print the refusals as a table.

    python -m benchmarks.malicious_caches

Each forgery is opened in a process of its own that may take 512 MiB more memory than it starts
with and 60 seconds. Ends with 1 if one is read without an error, ends otherwise than in an error of
ours, or touches a folder beside the cache.
"""

import multiprocessing
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import click
from click.testing import CliRunner

from benchmarks.bounded import limit_memory, peak, resident
from cache_builder.cli import cache_tools
from cache_builder.pack import pack
from shared.cache import open_cache
from shared.errors import ProjectError
from tests.malicious import CASES, QUIET_CASES, SLOW_CASES, Forge, forge, outside_of
from tests.support import FULL, REFERENCE, build

MEMORY = 512 * 2**20
SECONDS = 60


@dataclass
class Outcome:
    """What one forgery came to."""

    refusal: str
    "The error of reading, or the line that verify ends with."
    civil: bool
    "Whether everything ended in errors of ours, and in time."
    memory: int
    "Bytes taken at most, above the start."


@click.command()
def main() -> None:
    """Forge, open, print."""
    failures, most = 0, 0
    print("| tried | refused by | with |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        cache = reference_cache(Path(temporary))
        for case in [*CASES, *SLOW_CASES, *QUIET_CASES]:
            with tempfile.TemporaryDirectory() as folder:
                forged = forge(cache, Path(folder), case)
                before = outside_of(forged)
                outcome = in_a_child(forged, quiet=case in QUIET_CASES)
                civil = outcome.civil and outside_of(forged) == before
            failures += not civil
            most = max(most, outcome.memory)
            by = "verify, not read" if case in QUIET_CASES else "reading"
            print(f"| {case} | {by} | {'' if civil else '**FAILED** '}{outcome.refusal} |")
    total = len(CASES) + len(SLOW_CASES) + len(QUIET_CASES)
    print(
        f"\n{total} forgeries, {failures} not refused as they should be; at most "
        f"{most / 2**20:.0f} MiB of memory above the start (allowed: {MEMORY // 2**20} MiB)"
    )
    sys.exit(bool(failures))


def reference_cache(folder: Path) -> Path:
    """The tests' reference data set as a cache."""
    pack(
        REFERENCE / "annotations.json",
        REFERENCE / "images",
        folder,
        samples_per_tar=2,
        prefix="ref",
    )
    build(folder / "cache", sorted(folder.glob("*.tar")), FULL)
    return folder / "cache"


def in_a_child(forged: Forge, *, quiet: bool) -> Outcome:
    """Open in a process with bounds."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_look, args=(forged, quiet, theirs))
    child.start()
    theirs.close()
    outcome = Outcome(refusal=f"no end within {SECONDS} s", civil=False, memory=0)
    try:
        if ours.poll(SECONDS):
            outcome = ours.recv()
    except EOFError:
        outcome.refusal = "the process died"
    child.kill()
    child.join()
    return outcome


def _look(forged: Forge, quiet: bool, result: Connection) -> None:
    limit_memory(MEMORY)
    begin, start = resident(), time.monotonic()
    try:
        refusal, civil = _refusal(forged.root, quiet)
    except BaseException as error:
        refusal, civil = f"{type(error).__name__}: {error}", False
    civil = civil and time.monotonic() - start < SECONDS
    result.send(
        Outcome(refusal=_short(refusal, forged), civil=civil, memory=max(0, peak() - begin))
    )


def _refusal(root: Path, quiet: bool) -> tuple[str, bool]:
    """The line and whether it is as it should be."""
    read = _read(root)
    verified = CliRunner().invoke(cache_tools, ["verify", "--decode", str(root)])
    for command in ("info", "gc"):
        result = CliRunner().invoke(cache_tools, [command, str(root)])
        if result.exit_code not in (0, 1) or not isinstance(result.exception, SystemExit | None):
            return f"{command}: {result.exception!r}", False
    if not isinstance(verified.exception, SystemExit | None):
        return f"verify: {verified.exception!r}", False
    if quiet:
        problems = verified.stdout.splitlines()[:-1] or verified.stderr.splitlines()[-1:]
        told = problems[0] if verified.exit_code else "nothing to refuse: it is never interpreted"
        return told, read is None
    return read or "nothing", read is not None


def _read(root: Path) -> str | None:
    try:
        cache = open_cache(root)
        for key in cache.keys():  # noqa: SIM118  (a Cache is not a dict)
            cache.read(key)
    except ProjectError as error:
        return str(error)
    return None


def _short(text: str, forged: Forge) -> str:
    """Without what differs from run to run, and without what every refusal says."""
    text = text.replace(f"{forged.root}/", "").replace(str(forged.root), "CACHE")
    text = re.sub(r"-[0-9a-f]{8}\b", "-xxxxxxxx", text)
    for advice in (r"[.;] Run cache-tools repair.*", r"; cache-tools repair CACHE removes it"):
        text = re.sub(advice, "", text)
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text.replace("|", "\\|")[:200]


if __name__ == "__main__":
    main()
