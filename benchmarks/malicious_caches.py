"""Forge caches in every way that we know, open them, and print the refusals as a table.

    python -m benchmarks.malicious_caches

Each forgery is opened in a process of its own that may take 512 MiB more memory than it starts
with and 60 seconds. Ends with 1 if one is read without an error, ends otherwise than in an error of
ours, or touches a folder beside the cache.
"""

import gc
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import click
from click.testing import CliRunner

from benchmarks.bounded import limit_memory, peak, resident
from cache_builder.cli import cache_tools
from cache_builder.pack import pack
from shared.cache import open_cache
from shared.errors import ProjectError
from shared.images import ImageProcessor
from shared.tokenizer import load_tokenizer
from student_train.probe import check_probe
from tests.malicious import (
    CASES,
    DECODE_CASES,
    PROBE_CASES,
    QUIET_CASES,
    SLOW_CASES,
    Forge,
    forge,
    outside_of,
)
from tests.student_train.support import STUDENT, recipe
from tests.support import CLIP, FULL, REFERENCE, build

By = Literal["reading", "verify, not read", "train-student", "verify --decode"]
GROUPS: dict[By, Mapping[str, Callable[[Forge], None]]] = {
    "reading": {**CASES, **SLOW_CASES},
    "verify, not read": QUIET_CASES,
    "train-student": PROBE_CASES,
    "verify --decode": DECODE_CASES,
}
"Who has to notice -> forgeries."
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
    cases = [(case, by) for by, group in GROUPS.items() for case in group]
    print("| tried | refused by | with |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        cache = reference_cache(Path(temporary))
        for case, by in cases:
            with tempfile.TemporaryDirectory() as folder:
                forged = forge(cache, Path(folder), case)
                before = outside_of(forged)
                outcome = in_a_child(forged, by)
                civil = outcome.civil and outside_of(forged) == before
            failures += not civil
            most = max(most, outcome.memory)
            print(f"| {case} | {by} | {'' if civil else '**FAILED** '}{outcome.refusal} |")
    print(
        f"\n{len(cases)} forgeries, {failures} not refused as they should be; at most "
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


def in_a_child(forged: Forge, by: By) -> Outcome:
    """Open in a process with bounds."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_look, args=(forged, by, theirs))
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


def _look(forged: Forge, by: By, result: Connection) -> None:
    limit_memory(MEMORY)
    begin, start = resident(), time.monotonic()
    try:
        refusal, civil = _refusal(forged.root, by)
    except BaseException as error:
        refusal, civil = f"{type(error).__name__}: {error}", False
    civil = civil and time.monotonic() - start < SECONDS
    result.send(
        Outcome(refusal=_short(refusal, forged), civil=civil, memory=max(0, peak() - begin))
    )


def _refusal(root: Path, by: By) -> tuple[str, bool]:
    """The line and whether it is as it should be."""
    read = _error(lambda: read_all(root))
    started = None if read else _error(lambda: start_training(root))
    verified = _run("verify", "--decode", str(root))
    for done in (verified, _run("info", str(root)), _run("gc", str(root))):
        if done.uncaught or done.code not in (0, 1):
            return f"{done.command}: {done.uncaught or done.code}", False
    match by:
        case "reading":
            return read or "nothing", read is not None
        case "train-student":
            return started or "nothing", started is not None and read is None
        case "verify --decode":
            return verified.told, verified.code == 1 and started is None and read is None
        case _:
            told = verified.told if verified.code else "nothing to refuse: it is never interpreted"
            return told, read is None


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a command came to."""

    command: str
    "Its name."
    code: int
    "Exit code."
    told: str
    "The first problem, else the last line of stderr."
    uncaught: str
    "An exception that is no clean exit; empty if there was none."


def _run(*arguments: str) -> Done:
    result = CliRunner().invoke(cache_tools, arguments)
    clean = isinstance(result.exception, SystemExit | None)
    problems = result.stdout.splitlines()[:-1] or result.stderr.splitlines()[-1:]
    done = Done(
        command=arguments[0], code=result.exit_code, told=problems[0] if problems else "",
        uncaught="" if clean else repr(result.exception),
    )  # fmt: skip
    del result
    gc.collect()  # its frames hold what was read; a user's command is a process of its own
    return done


def start_training(root: Path) -> None:
    """What train-student asks of a cache's probes before it trains."""
    check_probe(
        open_cache(root), recipe(), load_tokenizer(STUDENT), ImageProcessor(CLIP, "pad"), accept=(),
        accepted={},
    )  # fmt: skip


def read_all(root: Path) -> None:
    """Every sample of a cache."""
    cache = open_cache(root)
    for key in cache.keys():  # noqa: SIM118  (a Cache is not a dict)
        cache.read(key)


def _error(act: Callable[[], None]) -> str | None:
    try:
        act()
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
