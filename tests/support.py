"""Real inputs for tests: images, annotations, tars, specs, teacher folders, and a way to build.

Everything is made by the code that users run, or written to disk as users' files are.
"""

import ctypes
import io
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor

from cache_builder.build import Builder, BuildReport
from cache_builder.build import build_cache as run_build
from cache_builder.cli import build_cache
from cache_builder.setup import load_builder
from shared.record import ShardRecord
from shared.sealed import seal
from shared.spec import CacheSpec

REFERENCE = Path(__file__).parent / "reference"
TEACHER, CLIP = REFERENCE / "teacher", REFERENCE / "clip"

ATTENTION = {"layers": [0], "encoding": "float32"}
VISION_TOKENS = {"encoding": "float32"}
LOGPROBS = {"top_k": 512, "encoding": "float32"}
ALIGN_ONLY = {
    "template": "v1",
    "image_aspect": "pad",
    "attention": ATTENTION,
    "vision_tokens": VISION_TOKENS,
}
FULL = {**ALIGN_ONLY, "logprobs": LOGPROBS}

Member = tuple[str, bytes]
Push = tuple[Path, set[str]]
"A file or folder that was pushed to the disk, and the names in it, or in its folder, then."


def picture(seed: int = 0, size: tuple[int, int] = (20, 30), mode: str = "RGB") -> Image.Image:
    """A random image; a seed gives the same one each time."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(seed: int = 0, size: tuple[int, int] = (20, 30)) -> bytes:
    """A random PNG."""
    return encoded(picture(seed, size))


def annotation(
    question: str = "<image>\nwhat color is the boat",
    answer: str = "red",
    *more: str,
    **fields: Any,
) -> dict[str, Any]:
    """A LLaVA annotation; `more` are further questions and answers in turn."""
    texts = (question, answer, *more)
    roles = ("human", "gpt")
    turns = [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"id": "x", "conversations": turns, **fields}


def sample(
    key: str, note: object = None, image: bytes | None = b"default", suffix: str = "png"
) -> list[Member]:
    """The tar members of one sample; `note` is an annotation or raw bytes."""
    if image == b"default":
        image = png()
    note = annotation() if note is None else note
    content = note if isinstance(note, bytes) else json.dumps(note).encode()
    members = [(f"{key}.json", content)]
    return members if image is None else [*members, (f"{key}.{suffix}", image)]


def text_sample(key: str, question: str = "what is the sky", answer: str = "blue") -> list[Member]:
    """The tar members of a sample without image."""
    return sample(key, annotation(question, answer), image=None)


def write_tar(path: Path, *samples: Sequence[Member]) -> Path:
    """A tar as webdataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as tar:
        for members in samples:
            for name, content in members:
                key, _, suffix = name.partition(".")
                tar.write({"__key__": key, suffix: content})
    return path


def builder(
    spec: Mapping[str, Any] = FULL,
    teacher: Path = TEACHER,
    *,
    vision_tower: Path | None = CLIP,
    batch_size: int = 4,
    dtype: str | None = None,
) -> Builder:
    """What build-cache loads, on the CPU."""
    return load_builder(
        CacheSpec.from_dict(spec),
        str(teacher),
        vision_tower=None if vision_tower is None else str(vision_tower),
        device="cpu",
        dtype=dtype,
        batch_size=batch_size,
    )


def build(
    out: Path,
    tars: Path | Sequence[Path],
    spec: Mapping[str, Any] = FULL,
    teacher: Path = TEACHER,
    **options: Any,
) -> BuildReport:
    """Build a cache as the command does, without the command."""
    tars = [tars] if isinstance(tars, Path) else tars
    return run_build(builder(spec, teacher, **options), tars, out)


def command(
    out: Path,
    data: Path | Sequence[Path | str],
    spec: Mapping[str, Any] | Path = FULL,
    teacher: Path = TEACHER,
    *options: str,
) -> Result:
    """Run `build-cache`; a result with any traceback in it fails the test."""
    if isinstance(spec, Mapping):
        path = out.parent / f"{out.name}-spec.yaml"
        if path.parent.is_dir():
            path.write_text(json.dumps(spec))  # JSON is YAML
    else:
        path = spec
    data = [data] if isinstance(data, Path) else data
    arguments = [
        *("--spec", path, "--teacher", teacher, "--vision-tower", CLIP, "--out", out),
        *(text for item in data for text in ("--data", item)),
        *("--device", "cpu", "--max-skipped", "100%", *options),
    ]
    # A later option overrides an earlier one, so `options` may repeat any of these.
    return invoke(build_cache, *map(str, arguments))


def invoke(cli: Any, *arguments: str) -> Result:
    """Run a command; anything but a clean exit or a click error is raised."""
    result = CliRunner().invoke(cli, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def error_line(result: Result) -> str:
    """The one line that a failed command ends with."""
    assert result.exit_code == 1, result.output
    lines = result.stderr.rstrip().splitlines()
    assert "Traceback" not in result.stderr
    assert lines[-1].startswith("Error: "), result.stderr
    return lines[-1]


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """Files of this process cannot grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing_fsync(error: BaseException, after: int = 0) -> Callable[[int], None]:
    """A stand-in for os.fsync that does nothing, and fails from its call number `after` on."""
    calls = iter(range(10**6))

    def fsync(_descriptor: int) -> None:
        if next(calls) >= after:
            raise error

    return fsync


@contextmanager
def denied(path: Path) -> Iterator[None]:
    """Give `path` mode 000, for root too: tests in containers run as root, who reads all files.

    What lets root do so are two of Linux's capabilities, which a thread can lay down and take up.
    """
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with _without_override():
            yield
    finally:
        path.chmod(mode)


@contextmanager
def _without_override() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    held = (ctypes.c_uint32 * 6)()  # twice: effective, permitted, inheritable
    assert libc.capget(header, held) == 0
    fewer = (ctypes.c_uint32 * 6)(*held)
    fewer[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


def record(out: Path, shard: str) -> ShardRecord:
    """A shard's record."""
    return ShardRecord.load(out, shard)


def edit_record(out: Path, shard: str, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a record as a forger would: with the right digest in front."""
    path = out / "records" / f"{shard}.json"
    values = json.loads(path.read_text())
    del values["sha256"]
    edit(values)
    path.write_bytes(seal(values))


def skipped(out: Path, shard: str) -> dict[str, str]:
    """Key -> reason of a shard's skipped samples."""
    return {item.key: item.reason for item in record(out, shard).skipped}


def stored_digests(out: Path) -> dict[str, dict[str, str]]:
    """Shard -> file -> sha256, from the records."""
    return {
        path.stem: {name: file.sha256 for name, file in record(out, path.stem).files.items()}
        for path in sorted((out / "records").glob("*.json"))
    }


def teacher_tensors() -> dict[str, Tensor]:
    """The reference teacher's weights under their published names."""
    tensors: dict[str, Tensor] = torch.load(TEACHER / "pytorch_model.bin", weights_only=True)
    return tensors


def teacher_copy(
    folder: Path,
    *,
    edit: Callable[[dict[str, Tensor]], object] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A copy of the reference teacher; `edit` changes its tensors, `config` its config fields."""
    shutil.copytree(TEACHER, folder)
    if edit is not None:
        tensors = teacher_tensors()
        edit(tensors)
        torch.save(tensors, folder / "pytorch_model.bin")
    if config is not None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder
