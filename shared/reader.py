"""Reading one committed shard: its files as its record has them, and rows of its arrays.

An own reader of standard files: docs/reading.md has what the libraries that read them take.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.array_layout import ArrayLayout
from shared.errors import CacheError, DamagedError
from shared.expected import Expected
from shared.inside import Entry, walk_inside
from shared.record import ShardRecord
from shared.stored_array import RowRead, StoredArray, read_file

Array = npt.NDArray[np.generic]

MAX_SAMPLE_BYTES = 2**30
"Of one sample's rows of one array, decompressed; 2048 rows of a 7B layer in float32 are 38 MB."
_MAX_METADATA = 2**16


@dataclass(kw_only=True, eq=False)
class ShardReader:
    """Arrays of one committed shard, opened when they are first read. Equal to itself only."""

    root: Path
    "The cache."
    record: ShardRecord
    "The shard; its samples are not asked for."
    expected: Mapping[str, Expected] = field(default_factory=dict)
    "What arrays have to be; others may be anything."
    _arrays: dict[str, StoredArray] = field(default_factory=dict)
    _small: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._folder = self.root / self.record.data
        try:
            there = dict(walk_inside(self.root, self.record.data))
        except OSError as error:
            raise self._failed("a folder", error) from error
        for file, stored in self.record.files.items():
            entry = there.get(file)
            if entry is None or entry.kind != "file" or entry.size != stored.size:
                found = _found(entry)
                raise self.damaged(f"{file} is {found}, its record says {stored.size} bytes")

    def has(self, name: str) -> bool:
        """Whether the shard holds this array."""
        return f"{name}/zarr.json" in self.record.files

    def layout(self, name: str) -> ArrayLayout:
        """Shape and type of an array.

        Raises:
            DamagedError: there is no such array, or its metadata is not what was written.
        """
        return self._array(name).layout

    def read_into(self, name: str, reads: Sequence[RowRead], *, wait: bool = True) -> list[RowRead]:
        """Rows of an array, each into its buffer of flat bytes.

        Args:
            wait: for the disk; otherwise as `StoredArray.read_into` says.

        Returns:
            Reads that would have waited for the disk.

        Raises:
            DamagedError: the array is missing or its bytes are not what was written.
            CacheError: the system does not let it be read.
        """
        array = self._array(name)
        try:
            return array.read_into(reads, wait=wait)
        except (ValueError, OSError) as error:
            raise self._failed(f"{name}/{array.layout.file}", error) from error

    def check_rows(self, name: str, start: int, stop: int) -> None:
        """Whether one sample can have these rows; asked before memory is taken for them.

        Raises:
            DamagedError: the array has no such rows, or they are too large.
        """
        layout = self.layout(name)
        if not 0 <= start <= stop <= layout.shape[0]:
            raise self.damaged(f"{name} has {layout.shape[0]} rows, not rows {start} to {stop}")
        if (stop - start) * layout.row_bytes > MAX_SAMPLE_BYTES:
            raise self.damaged(f"{name}: rows {start} to {stop} exceed {MAX_SAMPLE_BYTES} bytes")

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of one sample in new memory."""
        self.check_rows(name, start, stop)
        layout = self.layout(name)
        out = np.empty((stop - start, *layout.shape[1:]), dtype=layout.dtype)
        self.read_into(name, [RowRead(start, stop, out.reshape(-1).view(np.uint8))])
        return out

    def whole(self, name: str) -> Array:
        """All of a small array, kept in memory."""
        if name not in self._small:
            self._small[name] = self.rows(name, 0, self.layout(name).shape[0])
        return self._small[name]

    def _array(self, name: str) -> StoredArray:
        if name not in self._arrays:
            self._arrays[name] = self._open(name)
        return self._arrays[name]

    def _open(self, name: str) -> StoredArray:
        files = self.record.files
        metadata = files.get(f"{name}/zarr.json")
        if metadata is None:
            raise self.damaged(f"no array {name}")
        sizes = [stored.size for file, stored in files.items() if file.startswith(f"{name}/c/")]
        try:
            if metadata.size > _MAX_METADATA:
                raise ValueError(f"zarr.json of {metadata.size} bytes")  # noqa: TRY301
            if sum(sizes) >= 2**63:
                raise ValueError(f"c of {sum(sizes)} bytes")  # noqa: TRY301
            into = np.empty(metadata.size, dtype=np.uint8)
            text = read_file(self._folder / name / "zarr.json", into).tobytes()
            # No chunk's checksum covers this one: another shape or type would read as other values.
            found = hashlib.sha256(text).hexdigest()
            if found != metadata.sha256:
                raise ValueError(  # noqa: TRY301
                    f"zarr.json has sha256 {found[:12]}, but its record says {metadata.sha256[:12]}"
                )
            array = StoredArray.open(self._folder / name, text, sum(sizes))
        except (ValueError, RecursionError, OSError) as error:
            raise self._failed(name, error) from error
        if name in self.expected and (differs := self.expected[name].difference(array.layout)):
            raise self.damaged(f"{name} {differs}")
        return array

    def _failed(self, what: str, error: Exception) -> CacheError:
        """Why something was not read: damage, or the system, and then it may be whole."""
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        why = " ".join(why.split())
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            return CacheError(
                f"{self.root}: shard {self.record.name}: {what}: cannot be read ({why}); mend "
                "permissions or the disk and run the same command again"
            )
        return self.damaged(f"{what}: {why}")

    def damaged(self, what: str, *, digests_fit: bool = False) -> DamagedError:
        """The error that says so of this shard, and what to do.

        Args:
            digests_fit: the files match the record, so only `repair --decode` finds it.
        """
        command = "cache-tools repair --decode" if digests_fit else "cache-tools repair"
        return DamagedError(
            f"{self.root}: shard {self.record.name}: {what}. Run {command} {self.root}, then run "
            f"build-cache on {self.record.tar.name} again"
        )


def _found(entry: Entry | None) -> str:
    if entry is None:
        return "missing"
    return f"{entry.size} bytes" if entry.kind == "file" else f"a {entry.kind}"
