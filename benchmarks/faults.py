"""Make every file operation of a shard's commit fail, in every way, and look at what is left.

    python -m benchmarks.faults            # every operation, every fault; twenty minutes
    python -m benchmarks.faults --short

A library under the C library's functions (faults.c, compiled when this starts) counts the file
operations of a real build in a process of its own, zarr's included, and lets the n-th one fail.
After each fault three things must hold: the process ended with 0, with 1 and one line, or by the
crash; a shard that has a record is whole; and the same build again, undisturbed, ends with the
cache of a build that was left alone, bit by bit. Then: what would be on the disk after a power cut,
from the log of the operations; a real small file system that fills up; a read-only one; no
permission. Ends with 1 if there is one bad outcome.
"""

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from shared.cache import open_cache
from shared.console import Command
from shared.errors import ProjectError
from shared.record import read_records
from tests.processes import arguments, start, start_build
from tests.support import FULL, sample, stored_digests, text_sample, write_tar

KINDS = {
    "error": 1, "error though done": 2, "error from then on": 3, "short write": 4,
    "short write, then full": 5, "crash before": 6, "crash after": 7,
}  # fmt: skip
"Name -> number in faults.c."
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS)
"Of errors, in turn."
CRASHED = 77


@dataclass(frozen=True)
class Operation:
    """One line of the log."""

    number: int
    "From 1."
    name: str
    "create, open, write, read, fsync, close, mkdir, rename, link, unlink."
    path: str
    "What it was done to."
    to: str
    "The new name, of a rename."


@dataclass(frozen=True)
class Fault:
    """What is to go wrong."""

    number: int
    "Operation; 0 for none."
    kind: str
    "One of KINDS."
    code: int
    "Error number."


@click.command()
@click.option("--short", is_flag=True, help="Few operations: seconds.")
def main(short: bool) -> None:
    """Fail, look, go on."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        os.environ["LD_PRELOAD"] = str(_compile(folder))  # for the server that builds fork from
        tars = [
            write_tar(folder / "tars" / f"t-{n}.tar", sample(f"i{n}"), text_sample(f"x{n}"))
            for n in range(4)
        ]
        bad = _inject(folder, tars[0], short)
        bad += _power_cuts(folder, tars[0])
        bad += _small_disks(folder, tars, sizes=2 if short else 40)
        bad += _not_allowed(folder, tars[0])
    print(f"bad outcomes: {len(bad)}")
    for line in bad[:20]:
        print("  " + line)
    sys.exit(bool(bad))


def _compile(folder: Path) -> Path:
    library, source = folder / "faults.so", Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return library


# -- faults at every operation ---------------------------------------------------------------------


def _inject(folder: Path, tar: Path, short: bool) -> list[str]:
    reference = folder / "alone" / "cache"
    assert _run(folder, reference, tar, None) == 0
    expected, operations = stored_digests(reference), _log(folder)
    print(f"operations of one build of one shard: {len(operations)}")
    print(", ".join(f"{n} {name}" for name, n in Counter(o.name for o in operations).most_common()))
    heads = ("fault", "runs", "ended 0", "one line", "crashed", "committed", "bad")
    print(("{:<24}" + "{:>10}" * 6).format(*heads))
    bad: list[str] = []
    for kind in KINDS:
        outcomes: Counter[str] = Counter()
        for fault in _faults(kind, operations, short):
            outcome, problems = _try(folder, tar, fault, expected)
            outcomes.update(["runs", outcome, *("bad" for _ in problems[:1])])
            outcomes.update(["committed"] if (folder / "committed").exists() else [])
            operation = operations[fault.number - 1]
            bad += [
                f"{kind} ({os.strerror(fault.code)}) at {fault.number} {operation.name} "
                f"{operation.path}: {problem}"
                for problem in problems
            ]
        columns = ("runs", "ended 0", "one line", "crashed", "committed", "bad")
        print(("{:<24}" + "{:>10}" * 6).format(kind, *(outcomes[name] for name in columns)))
    return bad


def _faults(kind: str, operations: Sequence[Operation], short: bool) -> Iterator[Fault]:
    fitting = [o for o in operations if "short" not in kind or o.name == "write"]
    for operation in fitting[:: len(fitting) // 2 if short else 1]:
        code = errno.ENOSPC if "full" in kind else ERRORS[operation.number % len(ERRORS)]
        yield Fault(operation.number, kind, code)


def _try(
    folder: Path, tar: Path, fault: Fault, expected: dict[str, dict[str, str]]
) -> tuple[str, list[str]]:
    """How the process ended, and what is wrong with what it left."""
    out = folder / "suffering" / "cache"
    shutil.rmtree(out.parent, ignore_errors=True)
    code = _run(folder, out, tar, fault)
    output = (folder / "output").read_text()
    outcome = {0: "ended 0", 1: "one line", CRASHED: "crashed"}.get(code, f"exit code {code}")
    problems = [] if code in (0, 1, CRASHED) else [outcome]
    if code == 1 and not output.splitlines()[-1].startswith("Error: "):
        problems.append(f"no single line: {output.splitlines()[-1]}")
    if "Traceback" in output:
        problems.append("traceback")
    there = _whole_shards(out, problems)
    (folder / "committed").unlink(missing_ok=True)
    if there:
        (folder / "committed").touch()
    if code == 0 and not there:
        problems.append("ended with 0 but committed nothing")
    if (again := _run(folder, out, tar, None)) != 0:
        problems.append(f"the same build again: exit code {again}")
    elif stored_digests(out) != expected or len(_whole_shards(out, problems)) != 1:
        problems.append("the same build again: other content")
    return outcome, problems


def _whole_shards(out: Path, problems: list[str]) -> list[str]:
    """Shards with a record; adds to `problems` if one of them does not read whole."""
    try:
        if not any(out.glob("records/*.json")):
            return []
        cache = open_cache(out)
        for key in cache.keys():  # noqa: SIM118  (a Cache is no dict)
            cache.read(key)
        return list(read_records(out))
    except ProjectError as error:
        problems.append(f"a shard with a record does not read: {error}")
        return []


def _run(folder: Path, out: Path, tar: Path, fault: Fault | None) -> int:
    process = start(_build, folder, out, tar, fault, log=folder / "output")
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _build(folder: Path, out: Path, tar: Path, fault: Fault | None) -> None:
    """In the process: arm the library, then build as the command does."""
    from cache_builder.build import build_cache
    from tests.preload import BUILDER

    out.parent.mkdir(exist_ok=True)
    number, kind, code = (fault.number, KINDS[fault.kind], fault.code) if fault else (0, 0, 0)
    ctypes.CDLL(None).faults_arm(
        bytes(out.parent), bytes(folder / "operations"), ctypes.c_long(number), kind, code
    )
    Command("build", callback=lambda: build_cache(BUILDER, [tar], out) and None)([])


def _log(folder: Path) -> list[Operation]:
    lines = (folder / "operations").read_text().splitlines()
    return [
        Operation(int(n), name, path, to)
        for n, name, path, to in (line.split("\t") for line in lines)
    ]


# -- power cuts ------------------------------------------------------------------------------------


def _power_cuts(folder: Path, tar: Path) -> list[str]:
    """Of all that a power cut may lose (what no fsync pushed), lose all, at the worst time."""
    out = folder / "power" / "cache"
    assert _run(folder, out, tar, None) == 0
    operations = _log(folder)
    (record,) = read_records(out).values()
    needed = [out / record.data / file for file in record.files]
    problems = lost_by_power_cut(operations, out, needed)
    forgetful = [o for o in operations if o.name != "fsync" or "/data/" not in o.path]
    assert lost_by_power_cut(forgetful, out, needed), "this check finds nothing at all"
    print(f"power cut: {len(needed)} files and the record, {len(problems)} could be lost")
    return problems


def lost_by_power_cut(
    operations: Sequence[Operation], out: Path, needed: Sequence[Path]
) -> list[str]:
    """What could be missing though the record is there, or the record though the build ended."""
    content: set[str] = set()  # files whose bytes are on the disk
    entries: set[str] = set()  # names that are on the disk
    fresh: set[str] = set()  # names that their folder's next fsync pushes to the disk
    problems: list[str] = []

    def missing(path: Path, *, is_file: bool = True) -> bool:
        ways = [p for p in (path, *path.parents) if p.is_relative_to(out)]
        return not all(str(p) in entries for p in ways) or (is_file and str(path) not in content)

    record = None
    for operation in operations:
        path = operation.path
        if operation.name in ("create", "mkdir") and path not in entries:  # mkdir: may be there
            fresh.add(path)
        elif operation.name == "write":
            content.discard(path)
        elif operation.name in ("rename", "link"):
            fresh.add(operation.to)
            if path in content:
                content.add(operation.to)
            if Path(operation.to).parent == out / "records":
                record = Path(operation.to)
                problems += [f"a power cut may lose {p} of a record" for p in needed if missing(p)]
        elif operation.name == "fsync":
            content.add(path)
            pushed = {name for name in fresh if str(Path(name).parent) == path}
            fresh -= pushed
            entries |= pushed
    if record is None or missing(record):
        problems.append(f"a power cut after the end may lose {record}")
    return problems


# -- real disks ------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A memory file system of so many bytes."""
    folder.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
        check=True, capture_output=True,
    )  # fmt: skip
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def _small_disks(folder: Path, tars: list[Path], sizes: int) -> list[str]:
    """`build-cache` on disks of many sizes; each is then made larger and the build continued."""
    spec = folder / "spec.yaml"
    spec.write_text(json.dumps(FULL))
    alone = folder / "four"
    _command(folder, alone, tars, spec)
    expected = stored_digests(alone)
    needed = sum(4096 * -(-p.stat().st_size // 4096) for p in alone.rglob("*") if p.is_file())
    full = finished = 0
    shards: list[int] = []
    bad: list[str] = []
    try:
        for step in range(sizes):
            size = max(8192, needed * (step + 1) // sizes // 4096 * 4096)
            with small_disk(folder / "disk", size) as disk:
                problems: list[str] = []
                code, output = _command(folder, disk / "cache", tars, spec)
                full, finished = full + (code == 1), finished + (code == 0)
                last = output.splitlines()[-1]
                if code not in (0, 1) or "Traceback" in output:
                    problems.append(f"exit code {code}: {last}")
                if code == 1 and not (last.startswith("Error: ") and "No space left" in last):
                    problems.append(f"no line that names the full disk: {last}")
                shards.append(len(_whole_shards(disk / "cache", problems)))
                subprocess.run(["mount", "-o", "remount,size=64M", disk], check=True)
                code, output = _command(folder, disk / "cache", tars, spec)
                if code or stored_digests(disk / "cache") != expected:
                    problems.append("continued on the larger disk: other content")
                bad += [f"tmpfs of {size} bytes: {problem}" for problem in problems]
    except subprocess.CalledProcessError as error:
        print(f"real full disk: not tried, mounting is not allowed here ({error.stderr})")
        return bad
    print(
        f"tmpfs of {sizes} sizes up to {needed} bytes: {full} full (with {min(shards)} to "
        f"{max(shards)} of 4 shards built), {finished} large enough; continued: {sizes}; "
        f"bad {len(bad)}"
    )
    return bad


def _not_allowed(folder: Path, tar: Path) -> list[str]:
    """A read-only file system and a folder of somebody else's."""
    spec, bad = folder / "spec.yaml", []
    try:
        with small_disk(folder / "disk", 2**20) as disk:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            bad += _refused("read-only", *_command(folder, disk / "cache", [tar], spec))
    except subprocess.CalledProcessError:
        print("read-only: not tried, mounting is not allowed here")
    if os.getuid() == 0:
        (folder / "theirs").mkdir(mode=0o755)
        process = start(
            _as_nobody, arguments(folder / "theirs" / "cache", [tar], spec), log=folder / "output"
        )
        process.join(60)
        output = (folder / "output").read_text()
        bad += _refused("no permission", process.exitcode or 0, output)
    return bad


def _refused(name: str, code: int, output: str) -> list[str]:
    last = output.splitlines()[-1]
    print(f"{name}: exit code {code}, {last.split(': ', 1)[-1].split('/')[-1]}")
    fine = code == 1 and last.startswith("Error: ") and "Traceback" not in output
    return [] if fine else [f"{name}: exit code {code}: {last}"]


def _as_nobody(given: Sequence[str]) -> None:
    os.setgid(65534)
    os.setuid(65534)
    from cache_builder.cli import build_cache

    build_cache(list(given))


def _command(folder: Path, out: Path, tars: Sequence[Path], spec: Path) -> tuple[int, str]:
    process = start_build(arguments(out, tars, spec), folder / "output")
    process.join()
    assert process.exitcode is not None
    return process.exitcode, (folder / "output").read_text()


if __name__ == "__main__":
    main()
