"""Samples in tars: an index of each tar, and samples read by position.

A sample is the members that share a name up to the first dot (WebDataset's rule): one `.json` and
at most one image. Both stages read by position, so that any order, subset and world size works;
members are never unpacked to disk.
"""

import errno
import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from shared.bounds import MAX_SAMPLES, MAX_TEXT, check_containers
from shared.conversation import Conversation, parse_annotation
from shared.errors import InputError, UnusableSample, printable
from shared.progress import progress
from shared.readable import reading, sha256_of
from shared.record import Skipped

log = logging.getLogger(__name__)

T = TypeVar("T")

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_MAX_JSON, _MAX_IMAGE, _MAX_HEADER = 16 * 2**20, 64 * 2**20, 2**20
"Bytes; a name or extended header of a tar is at most `_MAX_HEADER`."
_MAX_END = 2**20
"Bytes of zeros that end a tar: one of tar's records, 10 kB if nothing else is asked for."


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """Where one file lies in its tar."""

    offset: int
    "Bytes from the start of the tar."
    size: int
    "Bytes."


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleEntry:
    """One sample in a tar's index."""

    key: str
    "WebDataset key."
    annotation: Member
    "The .json member."
    image: Member | None
    "The image member, if there is one."


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """What a tar holds, from its headers alone."""

    path: Path
    "The tar."
    samples: tuple[SampleEntry, ...]
    "Usable as far as the headers tell, in the tar's order."
    skipped: Mapping[str, str]
    "Key -> reason."
    sha256: str
    "Hexadecimal, over name, type, place and size of every member: tells tars apart unread."

    @property
    def name(self) -> str:
        """The shard's name: the file name without `.tar`."""
        return self.path.name.removesuffix(".tar")

    @property
    def num_samples(self) -> int:
        """Usable or not."""
        return len(self.samples) + len(self.skipped)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample, read and checked; the image still encoded."""

    key: str
    "WebDataset key."
    conversation: Conversation
    "Checked turns."
    image: bytes | None
    "JPEG, PNG or WebP."

    @property
    def image_digest(self) -> str | None:
        """sha256 of the encoded image: equal images are run and stored once."""
        return None if self.image is None else hashlib.sha256(self.image).hexdigest()


def index_tar(path: Path) -> TarIndex:
    """Read a tar's headers.

    Raises:
        InputError: cannot be read, not a tar, cut short, or of more samples than a shard may hold.
    """
    try:
        digest = hashlib.sha256()
        with _Headers(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            groups = _group(tar, digest)
            _check_end(path, tar.offset)
    # tarfile raises all of these on damaged headers; a chain of long names ends its recursion.
    except (
        tarfile.TarError, OSError, ValueError, IndexError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise InputError(f"{path}: {_unread(error)}") from error
    samples: list[SampleEntry] = []
    skipped: dict[str, str] = {}
    for key, members in groups.items():
        try:
            samples.append(_entry(key, members))
        except UnusableSample as reason:
            skipped[_listed(key, len(skipped))] = str(reason)
    if max(len(samples), len(skipped)) > MAX_SAMPLES:
        raise InputError(
            f"{path}: {len(groups)} samples, at most {MAX_SAMPLES} in a tar; pack it anew "
            "(cache-tools pack --samples-per-tar)"
        )
    return TarIndex(path=path, samples=tuple(samples), skipped=skipped, sha256=digest.hexdigest())


def _unread(error: Exception) -> str:
    # EINVAL comes of damage: a header that sends tarfile to where no file reaches.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return f"cannot be read ({error.strerror})"
    return f"truncated or not a tar ({error}); fetch or pack it again"


def index_tars(tars: Sequence[Path]) -> list[TarIndex]:
    """Indexes of all tars.

    Raises:
        InputError: tars cannot be read, or one sample key stands in two tars.
    """
    indexes, broken = index_readable_tars(tars)
    if broken:
        raise InputError(f"{len(broken)} of {len(tars)} tars cannot be read: {first_of(broken)}")
    return indexes


def first_of(broken: Sequence[InputError]) -> str:
    """What is wrong with the first tars that cannot be read."""
    return "; ".join(map(str, broken[:3]))


def index_readable_tars(tars: Sequence[Path]) -> tuple[list[TarIndex], list[InputError]]:
    """Indexes of the tars that can be read, and what is wrong with the others.

    Raises:
        InputError: one sample key stands in two tars.
    """
    indexes, broken = [], []
    for tar in progress("index", "tar", tars):
        try:
            indexes.append(index_tar(tar))
        except InputError as error:
            broken.append(error)
            log.error("%s", error)  # noqa: TRY400  (one line; the message says it all)
    refuse_repeated_keys(indexes, {})
    return indexes, broken


def refuse_repeated_keys(indexes: Iterable[TarIndex], known: Mapping[str, str]) -> None:
    """Refuse a sample key that stands in two tars.

    Args:
        known: keys of tars besides `indexes` -> the tar's name.

    Raises:
        InputError: names the key and both tars.
    """
    seen = dict(known)
    for index in indexes:
        for sample in index.samples:
            if sample.key in seen:
                raise InputError(
                    f"sample {sample.key!r} stands in {seen[sample.key]} and in {index.path.name}; "
                    "keys must differ between all tars of a cache: pack the data sets as one JSON "
                    "list (cache-tools pack numbers ids that stand again), or change the ids"
                )
            seen[sample.key] = index.path.name


def skipped_by_headers(indexes: Sequence[TarIndex]) -> list[Skipped]:
    """What the tars' headers rule out already."""
    return [
        Skipped(key=key, reason=reason)
        for index in indexes
        for key, reason in index.skipped.items()
    ]


def read_sample(tar: Path, entry: SampleEntry) -> Sample:
    """One sample, checked.

    Raises:
        UnusableSample: with the reason.
        InputError: the tar cannot be read at all.
    """
    return parse_sample(entry.key, *read_members(tar, entry))


def read_members(tar: Path, entry: SampleEntry) -> tuple[bytes, bytes | None]:
    """A sample's annotation and image as they lie in the tar.

    Raises:
        InputError: the tar cannot be read at all.
    """
    with reading(tar, InputError), tar.open("rb") as file:
        annotation = _read(file.fileno(), entry.annotation)
        return annotation, _read(file.fileno(), entry.image) if entry.image else None


def parse_sample(key: str, annotation: bytes, image: bytes | None) -> Sample:
    """One sample from the bytes of its files, checked.

    Raises:
        UnusableSample: with the reason.
    """
    conversation = parse_annotation(_parse_json(annotation), has_image=image is not None)
    return Sample(key=key, conversation=conversation, image=image)


def read_image(tar: Path, entry: SampleEntry) -> bytes | None:
    """A sample's image, still encoded, without its text; None if it has none.

    Raises:
        InputError: the tar cannot be read at all.
    """
    if entry.image is None:
        return None
    with reading(tar, InputError), tar.open("rb") as file:
        return _read(file.fileno(), entry.image)


class _Headers(io.BufferedReader):
    """A tar of which only headers are read, none of them large.

    tarfile takes the size of a long name or an extended header from the tar itself and reads it as
    a whole.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes, at most {_MAX_HEADER}")
        return super().read(size)


def _group(
    tar: tarfile.TarFile, digest: "hashlib._Hash"
) -> dict[str, list[tuple[str, Member | None]]]:
    groups: dict[str, list[tuple[str, Member | None]]] = {}
    previous = None
    for number, info in enumerate(tar):
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
        if info.size < 0:  # the next header would be this one again
            raise tarfile.ReadError(f"a member of {info.size} bytes")
        if number > 8 * MAX_SAMPLES:
            raise tarfile.ReadError(f"over {number} members")
        line = f"{info.name}\0{info.type.decode('latin-1')}\0{info.offset_data}\0{info.size}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
        if info.isdir():
            continue
        folder, _, file = info.name.rpartition("/")
        stem, _, suffix = file.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if key in groups and key != previous:
            groups[key].append(("duplicate", None))
        plain = info.isreg() and not info.issparse()  # a sparse one's bytes are not its content
        member = Member(offset=info.offset_data, size=info.size) if plain else None
        groups.setdefault(key, []).append((suffix.lower(), member))
        previous = key
    return groups


def _entry(key: str, members: Sequence[tuple[str, Member | None]]) -> SampleEntry:
    if not key or len(key) > MAX_TEXT or not key.isprintable():
        raise UnusableSample(f"name is empty, over {MAX_TEXT} characters, or cannot be printed")
    suffixes = [suffix for suffix, _ in members]
    images = [member for suffix, member in members if suffix in IMAGE_SUFFIXES]
    annotations = [member for suffix, member in members if suffix == "json"]
    kinds = [suffix for suffix in suffixes if suffix != "duplicate"]
    if len(kinds) < len(suffixes) and len(set(kinds)) == len(kinds):
        raise UnusableSample("its files do not lie side by side in the tar (tar --sort=name)")
    if "duplicate" in suffixes or len(annotations) > 1:
        raise UnusableSample("duplicate key: two samples of this name in the tar")
    if not annotations:
        raise UnusableSample("no .json beside it")
    if len(images) > 1:
        raise UnusableSample("more than one image")
    if None in images or annotations[0] is None:
        raise UnusableSample("member is a link or special file")
    if annotations[0].size > _MAX_JSON:
        raise UnusableSample(f"JSON of {annotations[0].size} bytes, at most {_MAX_JSON}")
    if images and images[0] is not None and images[0].size > _MAX_IMAGE:
        raise UnusableSample(f"image of {images[0].size} bytes, at most {_MAX_IMAGE}")
    return SampleEntry(key=key, annotation=annotations[0], image=images[0] if images else None)


def _listed(key: str, number: int) -> str:
    """A key as skip lists show it: numbered where it had to be changed, so that none is lost."""
    text = printable(key, most=MAX_TEXT)
    return text if text == key else f"{text} ({number})"


def _check_end(path: Path, begin: int) -> None:
    """Refuse what a tar does not end with: tarfile stops at the first block of zeros, and samples
    behind it would be lost without a word.
    """
    with path.open("rb") as file:
        file.seek(begin)
        end = file.read(_MAX_END + 1)
    if len(end) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no end-of-archive mark")
    if any(end):
        raise tarfile.ReadError("more behind its end: damaged, or several tars in one file")
    if len(end) > _MAX_END:
        raise tarfile.ReadError(f"over {_MAX_END} bytes of zeros behind its last member")


def _read(descriptor: int, member: Member) -> bytes:
    content = os.pread(descriptor, member.size, member.offset)
    if len(content) != member.size:
        raise OSError(None, "the tar became shorter while it was read")
    return content


def _parse_json(content: bytes) -> object:
    try:
        check_containers(content)
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnusableSample(f"JSON cannot be parsed ({error})") from error


def spread(items: Sequence[T], number: int) -> list[T]:
    """At most `number` items, evenly spread from the first to the last."""
    places = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[place] for place in places.tolist()]


def tar_sha256(path: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """Digest of a whole tar, hexadecimal.

    Args:
        advance: told the bytes that are done, piece by piece, for a progress bar.

    Raises:
        InputError: the tar cannot be read.
    """
    with reading(path, InputError), path.open("rb", buffering=0) as file:
        return sha256_of(file, advance)
