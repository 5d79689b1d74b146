"""Feed broken records, plans, arrays, tars and images to whatever reads them.

    python -m benchmarks.fuzz --minutes 10

Hypothesis changes a real cache and a real tar, digests and checksums put right so that the change
gets past them, and hands them to the reading API, `info`, `verify --decode`, `gc` and `diff`, and
to the tar and image readers. All of it happens in a process that may take 512 MiB of memory above
its start and in which every opened file is noted. Ends with 1 at the first thing that is neither a
good result nor an error of ours, at a lack of memory, or when a file outside the folder is opened.
"""

import copy
import io
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import google_crc32c
import hypothesis
import numpy as np
from hypothesis import strategies as st

from benchmarks.bounded import limit_memory, peak, resident
from cache_builder.diff import diff_caches
from cache_builder.gc import find_leftovers
from cache_builder.summary import summarise
from cache_builder.verify import verify_cache
from shared.cache import open_cache
from shared.errors import ProjectError, UnusableSample
from shared.images import decode_image
from shared.samples import index_tar, read_image, read_sample
from shared.sealed import seal

MEMORY = 512 * 2**20
ROOT = Path(__file__).parents[1]
ODD = (
    None, True, False, 0, -1, 1, 2**31, 2**40, 2**63 - 1, 2**63, -(2**63), 1e300, 0.5, "", "..",
    "/etc/passwd", "../..", "a" * 600, "\0", "\x1b[2J", "\ud800", "data/ref-000000-01234567", [],
    {}, [[]], [0] * 50, ["s0", "s0"], {"": ""}, "numcodecs.pickle", "object", "float16", "uint8",
)  # fmt: skip
"Values that JSON is changed to."
TAR_FIELDS = ((0, 100), (124, 12), (156, 1), (157, 100), (345, 155))
"Offset and length of name, size, type, link and prefix in a tar's header."
TAR_SIZES = (b"77777777777\0", b"\x80" + b"\0" * 4 + b"\x7f" * 7, b"\xff" * 12, b"0" * 11 + b"\0")
TAR_TYPES = "xgLKS123567A"


@click.command()
@click.option("--minutes", default=10.0, show_default=True, help="How long.")
@click.option("--seed", default=None, type=int, help="Of the first round.  [default: the clock's]")
@click.option("--child", type=click.Path(path_type=Path), hidden=True, help="Folder to work in.")
def main(minutes: float, seed: int | None, child: Path | None) -> None:
    """Make a cache, start a bounded process on it."""
    seed = int(time.time()) if seed is None else seed
    if child is not None:
        sys.exit(fuzz(child, seconds=60 * minutes, seed=seed))
    from benchmarks.malicious_caches import reference_cache

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        reference_cache(folder)
        sys.exit(run_child(folder, minutes, seed).returncode)


def run_child(folder: Path, minutes: float, seed: int) -> "subprocess.CompletedProcess[str]":
    """Fuzz the cache and the tars in `folder` in a process of its own.

    The process has not loaded torch: its memory is that of the code under test.
    """
    options = ["--child", folder, "--minutes", minutes, "--seed", seed]
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.fuzz", *map(str, options)],
        cwd=ROOT, env=environment, check=False, text=True,
    )  # fmt: skip


class Target:
    """The cache and the tar that are changed and put back, and what came of each change."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.tar = folder / "fuzzed.tar"
        packed = min(folder.glob("ref-*.tar"))
        self.tar_content = packed.read_bytes()
        self.files = {p: p.read_bytes() for p in self.cache.rglob("*") if p.is_file()}
        self.record = self.cache / "records" / "ref-000000.json"
        self.values = json.loads(self.files[self.record])
        del self.values["sha256"]
        self.data = self.cache / self.values["data"]
        self.metadata = sorted(p for p in self.files if p.parent.parent == self.data)
        self.chunks = sorted(
            p for p in self.files if p.is_relative_to(self.data) and p.name != "zarr.json"
        )
        self.plan = next(p for p in self.files if p.parent.name == "plans")
        self.images = [
            image
            for entry in index_tar(packed).samples
            if (image := read_image(packed, entry)) is not None
        ]
        self.counts: Counter[tuple[str, str]] = Counter()

    def count(self, target: str, refused: bool) -> None:
        self.counts[target, "refused" if refused else "accepted"] += 1

    def try_cache(self, target: str, changed: dict[Path, bytes]) -> None:
        """Write the changed files, use the cache in every way, put the files back."""
        try:
            for path, content in changed.items():
                path.write_bytes(content)
            refused = [_is_refused(use) for use in (self._read, self._look)]
            self.count(target, any(refused))
        finally:
            for path in changed:
                path.write_bytes(self.files[path])

    def try_data(self, target: str, path: Path, content: bytes) -> None:
        """Change a file of the shard; the record says that it is right."""
        values = copy.deepcopy(self.values)
        stored = {"size": len(content), "sha256": sha256(content).hexdigest()}
        values["files"][path.relative_to(self.data).as_posix()] = stored
        self.try_cache(target, {path: content, self.record: seal(values)})

    def _read(self) -> None:
        cache = open_cache(self.cache)
        keys = cache.keys()
        for key in keys:
            _is_refused(lambda key=key: cache.read(key))
        cache.read_batch(keys)

    def _look(self) -> None:
        verify_cache(self.cache, workers=1, decode=True)
        summarise(self.cache)
        find_leftovers(self.cache)
        diff_caches(self.cache, self.cache)


def _is_refused(use: Callable[[], object]) -> bool:
    try:
        use()
    except ProjectError as error:
        if len(str(error)) > 10_000:
            raise RuntimeError(f"a message of {len(str(error))} characters") from error
        return True
    return False


def _read_tar(tar: Path) -> None:
    for entry in index_tar(tar).samples:
        with suppress(UnusableSample):
            read_sample(tar, entry)


# What is changed


@st.composite
def changed_json(draw: st.DrawFn, values: Any) -> Any:
    """JSON with one to three places changed, added or taken away."""
    values = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        place, key = values, None
        while isinstance(place, dict | list) and place:
            inside = list(place) if isinstance(place, dict) else list(range(min(len(place), 50)))
            parent, key = place, draw(st.sampled_from(inside))
            place = place[key]
            if draw(st.integers(0, 3)) == 0:
                break
        if key is None:
            break
        match draw(st.integers(0, 5)):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[draw(st.sampled_from(["more", "format", "..", ""]))] = parent[key]
            case 2 if isinstance(place, int) and not isinstance(place, bool):
                parent[key] = place + draw(st.sampled_from([-1, 1, 2**20, 2**32, -(2**33)]))
            case _:
                parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return values


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a few pieces overwritten, cut out or doubled."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(changed)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64, 512]))
        match draw(st.integers(0, 4)):
            case 0:
                del changed[begin : begin + length]
            case 1:
                changed[begin:begin] = changed[begin : begin + length]
            case 2:
                changed[begin : begin + length] = draw(st.sampled_from([b"\0", b"\xff"])) * length
            case _:
                changed[begin : begin + length] = draw(st.binary(max_size=length))
    return bytes(changed)


@st.composite
def changed_shard_file(draw: st.DrawFn, content: bytes) -> bytes:
    """A shard file of other chunks, or of another index, whose checksums are right."""
    length = int.from_bytes(content[:8], "little") - 4
    if not 0 < length < len(content):
        return draw(changed_bytes(content))
    table = np.frombuffer(content[:length], dtype="<u8").copy()
    if draw(st.booleans()):
        place = draw(st.integers(0, len(table) - 1))
        step = draw(st.sampled_from([-1, 1, -4, 16, 2**31, 2**62]))
        odd = draw(st.sampled_from([0, 2**63, 2**64 - 1, None]))
        table[place] = (int(table[place]) + step) % 2**64 if odd is None else odd
        index = table.tobytes()
        return index + _crc(index) + content[length + 4 :]
    pieces = []
    for begin, size in table.reshape(-1, 2).tolist():
        piece = content[begin : begin + size - 4]
        if draw(st.integers(0, 2)) == 0:
            piece = draw(changed_bytes(piece))
        pieces.append(piece + _crc(piece))
    begin = length + 4
    for number, piece in enumerate(pieces):
        table[2 * number : 2 * number + 2] = begin, len(piece)
        begin += len(piece)
    return table.tobytes() + _crc(table.tobytes()) + b"".join(pieces)


@st.composite
def changed_tar(draw: st.DrawFn, content: bytes) -> bytes:
    """A tar with changed headers, whose checksums are right, or with changed bytes anywhere."""
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(content))
    changed = bytearray(content)
    headers = [n for n in range(0, len(content), 512) if content[n + 257 : n + 262] == b"ustar"]
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.sampled_from(headers))
        offset, length = draw(st.sampled_from(TAR_FIELDS))
        match offset:
            case 124:
                field = draw(st.sampled_from(TAR_SIZES) | st.binary(min_size=12, max_size=12))
            case 156:
                field = draw(st.sampled_from([*TAR_TYPES])).encode()
            case _:
                names = [b"../../x.json", b"/etc/passwd", b"a" * 100, b"\xff\xfe.json", b"s0.json"]
                field = draw(st.sampled_from(names) | st.binary(max_size=length))
        changed[start + offset : start + offset + length] = field[:length].ljust(length, b"\0")
        _sign_header(changed, start)
    return bytes(changed)


def _sign_header(tar: bytearray, start: int) -> None:
    header = tar[start : start + 512]
    header[148:156] = b" " * 8
    tar[start + 148 : start + 156] = b"%06o\0 " % sum(header)


def _crc(content: bytes) -> bytes:
    return struct.pack("<I", google_crc32c.value(bytes(content)))


# The run


def make_tests(target: Target) -> dict[str, Callable[[Any], None]]:
    """Name -> a function of hypothesis' data."""
    files = target.files

    def record_values(data: st.DataObject) -> None:
        changed = data.draw(changed_json(target.values))
        target.try_cache("record: values", {target.record: seal(changed)})

    def record_bytes(data: st.DataObject) -> None:
        rest = data.draw(changed_bytes(files[target.record][77:]))
        head = b'{"sha256":"%s",' % sha256(rest).hexdigest().encode()
        target.try_cache("record: bytes", {target.record: head + rest})

    def plan(data: st.DataObject) -> None:
        content = data.draw(changed_bytes(files[target.plan]) | st.binary(max_size=64))
        target.try_cache("plan: bytes", {target.plan: content})

    def metadata(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(target.metadata))
        changed = data.draw(changed_json(json.loads(files[path])))
        target.try_data("zarr.json: values", path, json.dumps(changed).encode())

    def chunks(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(target.chunks))
        content = data.draw(changed_shard_file(files[path]))
        target.try_data("chunks and index", path, content)

    def tar(data: st.DataObject) -> None:
        target.tar.write_bytes(data.draw(changed_tar(target.tar_content)))
        refused = _is_refused(lambda: _read_tar(target.tar))
        target.count("tar", refused)

    def image(data: st.DataObject) -> None:
        content = data.draw(changed_bytes(data.draw(st.sampled_from(target.images))))
        try:
            decode_image(content)
        except UnusableSample:
            target.count("image", True)
        else:
            target.count("image", False)

    return {
        f.__name__: f for f in (record_values, record_bytes, plan, metadata, chunks, tar, image)
    }


def fuzz(folder: Path, *, seconds: float, seed: int) -> int:
    """Fuzz in this process; 0 if nothing was found."""
    target = Target(folder)
    decode_image(target.images[0])  # Pillow loads its formats now, not under the eyes of the watch
    target.try_cache("unchanged", {})
    begin = resident()
    limit_memory(MEMORY)
    opened = watch_files(folder)
    chance, end, rounds = random.Random(seed), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for test in make_tests(target).values():
            _run(test, chance.randrange(2**32), examples=40)
            assert not opened, f"opened outside the folder: {opened[:5]}"
        rounds += 1
    print_counts(target.counts)
    print(
        f"\n{seconds / 60:.1f} minutes, seed {seed}: nothing but errors of ours; at most "
        f"{(peak() - begin) / 2**20:.0f} MiB of memory above the start (allowed: "
        f"{MEMORY // 2**20} MiB); no file outside the folder opened"
    )
    return 0


def _run(test: Callable[[Any], None], seed: int, examples: int) -> None:
    settings = hypothesis.settings(
        max_examples=examples, deadline=None, database=None, derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(st.data())
    def run(data: st.DataObject) -> None:
        test(data)

    run()


def watch_files(folder: Path) -> list[str]:
    """Paths outside `folder` that are opened from now on, but for Python's own modules."""
    python = {*sys.path, sys.prefix, sys.base_prefix, str(ROOT)}
    allowed = tuple(os.path.realpath(path) for path in (folder, *filter(None, python), "/dev/null"))
    opened: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.remove", "os.rename", "os.symlink"):
            return
        path = arguments[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str):
            return  # a descriptor that is open already
        is_part = "/" not in path and path != ".."  # opened from the folder before it
        if not is_part and not os.path.realpath(path).startswith(allowed):
            opened.append(f"{event} {path}")

    sys.addaudithook(note)
    return opened


def print_counts(counts: Counter[tuple[str, str]]) -> None:
    """One row per target."""
    text = io.StringIO()
    print(f"{'changed':<20} {'tried':>8} {'refused':>8} {'accepted':>9}", file=text)
    names = [name for name in dict.fromkeys(name for name, _ in counts) if name != "unchanged"]
    total: Counter[str] = Counter()
    for name in names:
        refused, accepted = counts[name, "refused"], counts[name, "accepted"]
        total.update(refused=refused, accepted=accepted)
        print(f"{name:<20} {refused + accepted:>8} {refused:>8} {accepted:>9}", file=text)
    print(f"{'all':<20} {total.total():>8} {total['refused']:>8} {total['accepted']:>9}", file=text)
    print(text.getvalue(), end="")


if __name__ == "__main__":
    main()
