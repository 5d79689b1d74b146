"""LLaVA-format JSON + image folder -> WebDataset tars, the same bytes for the same input.

Conversations about one image stay together, so that it lies in one tar only and the teacher's tower
runs once for it. LLaVA's sets name several of them by the image, so ids stand more than once; keys
of tars must not, and are numbered then.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import webdataset
from tqdm import tqdm

from shared.bounds import MAX_TEXT
from shared.errors import ConfigError, InputError, printable
from shared.progress import progress
from shared.readable import is_file, reading
from shared.record import NAME
from shared.samples import IMAGE_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What was packed."""

    tars: int
    "Tars written."
    samples: int
    "Samples in them."
    images: int
    "Image files that are used."
    renamed: int
    "Samples whose id stood before, under the same key."


def pack(
    annotations: Path, images: Path | None, out: Path, *, samples_per_tar: int, prefix: str
) -> PackReport:
    """Write `out/<prefix>-000000.tar`, ....

    A tar is closed once it holds `samples_per_tar` samples; conversations about one image are not
    parted, so it may hold a few more.

    Raises:
        InputError: the JSON is not a list of annotations, images are missing, cannot be read or
            leave the folder, `out` holds tars already or cannot be written.
        ConfigError: no shard can have such a prefix.
    """
    if not NAME.fullmatch(f"{prefix}-000000"):  # which build-cache would refuse
        raise ConfigError(
            f"--prefix {prefix!r}: expected letters, digits, '.', '_', '-', but no "
            "'.' or '-' in front"
        )
    entries = _read_annotations(annotations)
    ids = [_key(entry) for entry in entries]
    keys = _distinct(ids)
    samples = [
        _Packed(key=key, annotation=entry, image=image)
        for key, entry, image in zip(keys, entries, _find_images(entries, images), strict=True)
    ]
    if any(out.glob(f"{prefix}-{'[0-9]' * 6}.tar")):
        raise InputError(f"{out}: holds {prefix}-*.tar already; pack into an empty folder")
    shards = list(_cut(_group_by_image(samples), samples_per_tar))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with progress("pack", "sample", total=len(samples)) as bar:
            for number, shard in enumerate(shards):
                partial = out / f"{prefix}-{number:06d}.tar.partial"
                _write(partial, shard, bar)
                partial.replace(partial.with_suffix(""))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
    distinct = {sample.image for sample in samples if sample.image is not None}
    return PackReport(
        tars=len(shards),
        samples=len(samples),
        images=len(distinct),
        renamed=sum(key != name for key, name in zip(keys, ids, strict=True)),
    )


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """One sample on its way into a tar."""

    key: str
    "Its members' name before the first dot."
    annotation: dict[str, Any]
    "As it stood in the JSON."
    image: Path | None
    "Its file."


def _read_annotations(path: Path) -> list[dict[str, Any]]:
    try:
        with reading(path, InputError):
            entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: expected a list of objects, as in LLaVA's data sets")
    if not entries:
        raise InputError(f"{path}: holds no samples")
    for number, entry in enumerate(entries):
        key = _key(entry)
        if not key or isinstance(entry["id"], bool) or not isinstance(entry["id"], str | int):
            raise InputError(f"{path}: entry {number} has no id, a text or a whole number")
        if len(key) > MAX_TEXT or not key.isprintable():  # half of a character is not, either
            raise InputError(
                f"{path}: id {printable(key, most=80)!r} of entry {number} cannot be printed or is "
                f"over {MAX_TEXT} characters"
            )
    return entries


def _key(entry: Mapping[str, Any]) -> str:
    """The id as a WebDataset key: no dots (they end a key) and no folders."""
    return str(entry.get("id", "")).replace("/", "_").replace(".", "_")


def _distinct(keys: Sequence[str]) -> list[str]:
    """The keys, those that stood before with the next free number behind them: `k`, `k-1`, `k-2`.

    Keys that stand once stay as they are, whatever others are numbered to.
    """
    taken, numbers = set(keys), dict[str, Iterator[int]]()
    distinct = []
    for key in keys:
        name = key
        if key in numbers:
            candidates = (f"{key}-{number}" for number in numbers[key])
            name = next(candidate for candidate in candidates if candidate not in taken)
            taken.add(name)
        numbers.setdefault(key, count(1))
        distinct.append(name)
    return distinct


def _find_images(entries: Sequence[Mapping[str, Any]], images: Path | None) -> list[Path | None]:
    paths, missing = list[Path | None](), list[str]()
    for entry in progress("find images", "sample", entries):
        path = _image_path(entry, images)
        if path is not None and not is_file(path, InputError):
            missing.append(entry["image"])
        paths.append(path)
    if missing:
        names = list(dict.fromkeys(missing))
        raise InputError(
            f"{len(missing):,} of {len(entries):,} samples name an image that is not there: "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}; put what is missing into "
            f"{images}, name another folder with --images, or take these samples out of the JSON"
        )
    return paths


def _image_path(entry: Mapping[str, Any], images: Path | None) -> Path | None:
    name = entry.get("image")
    if not name:
        return None
    if not isinstance(name, str):
        raise InputError(f"sample {entry['id']!r}: image must be one file name, found {name!r}")
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise InputError(f"sample {entry['id']!r}: image {name!r} leaves the image folder")
    if PurePosixPath(name).suffix[1:].lower() not in IMAGE_SUFFIXES:
        raise InputError(
            f"sample {entry['id']!r}: image {name!r} is none of {', '.join(IMAGE_SUFFIXES)}"
        )
    if images is None:
        raise InputError(f"sample {entry['id']!r}: names image {name!r}; give its folder, --images")
    return images / name


def _group_by_image(samples: Sequence[_Packed]) -> list[list[_Packed]]:
    """Samples of one image together, where the first of them stood."""
    groups: dict[object, list[_Packed]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(sample.image or number, []).append(sample)
    return list(groups.values())


def _cut(groups: Sequence[list[_Packed]], samples_per_tar: int) -> Iterator[list[_Packed]]:
    shard: list[_Packed] = []
    for group in groups:
        shard += group
        if len(shard) >= samples_per_tar:
            yield shard
            shard = []
    if shard:
        yield shard


def _write(path: Path, samples: Sequence[_Packed], bar: "tqdm[Any]") -> None:
    buffer = io.BytesIO()
    # Fixed owner, mode and time: the same input gives the same bytes.
    with webdataset.TarWriter(buffer, encoder=False, mtime=0, user="", group="") as tar:
        for sample in samples:
            members: dict[str, Any] = {
                "__key__": sample.key,
                "json": json.dumps(sample.annotation).encode(),
            }
            if sample.image is not None:
                members[sample.image.suffix[1:].lower()] = _read_image(sample.image)
            tar.write(members)
            bar.update()
    path.write_bytes(buffer.getvalue())


def _read_image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); make it readable or take its samples out "
            "of the JSON, and pack into an empty folder"
        ) from error
