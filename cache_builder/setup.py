"""Loading what a build needs from names on a command line."""

import torch

from cache_builder.build import Builder
from cache_builder.teacher import Teacher
from shared.cache import Cache
from shared.checkpoint import ModelFolder
from shared.errors import ConfigError
from shared.identity import compare
from shared.images import ImageProcessor
from shared.mobilevlm import VLMConfig, keep_float32
from shared.spec import CacheSpec
from shared.strict import shown
from shared.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

DTYPES = ("float64", "float32", "bfloat16", "float16")
"Number formats that a teacher can run in."


def load_builder(
    spec: CacheSpec,
    teacher: str,
    *,
    vision_tower: str | None,
    device: str | None,
    dtype: str | None,
    batch_size: int | None,
) -> Builder:
    """Load the teacher, its tokenizer and its image processor.

    Args:
        batch_size: by default 16 on CUDA; 4 on the CPU, which gains nothing from more images at a
            time and needs memory for them.

    Raises:
        ConfigError: no such device or number format, or a spec that the teacher cannot meet.
        CheckpointError: the teacher's folder cannot be used.
    """
    if dtype not in (None, *DTYPES):  # a record's, which may be a stranger's
        raise ConfigError(f"number format {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    folder = ModelFolder(teacher)
    chosen = pick_device(device)
    keep_float32()
    default = "bfloat16" if chosen.type == "cuda" else "float32"
    loaded = Teacher(
        folder, spec, vision_tower=vision_tower, device=chosen,
        dtype=getattr(torch, dtype or default),
    )  # fmt: skip
    return Builder(
        spec=spec,
        teacher=loaded,
        tokenizer=load_teacher_tokenizer(folder, loaded.config),
        processor=ImageProcessor(loaded.config.tower_folder, spec.image_aspect),
        batch_size=batch_size or (16 if chosen.type == "cuda" else 4),
    )


def load_builder_of(
    cache: Cache,
    teacher: str,
    spec: CacheSpec,
    advice: str,
    *,
    vision_tower: str | None,
    device: str | None,
    batch_size: int | None,
) -> Builder:
    """The teacher that built a cache, set up to give what `spec` says in the cache's number format.

    Args:
        advice: what to do about another teacher, for the message.

    Raises:
        MismatchError: it is not the cache's; both values are named.
        CheckpointError: the teacher's folder cannot be used.
    """
    builder = load_builder(
        spec, teacher, vision_tower=vision_tower, device=device, batch_size=batch_size,
        dtype=str(cache.identity["numerics"]["dtype"]),
    )  # fmt: skip
    here = {**builder.identity, "spec": cache.identity["spec"]}
    compare(f"cache {cache.root}", cache.identity, here, advice)
    return builder


def load_teacher_tokenizer(folder: ModelFolder, config: VLMConfig) -> Tokenizer:
    """The tokenizer in the teacher's folder.

    Raises:
        CheckpointError: there is none, or not for this teacher.
    """
    tokenizer = load_tokenizer(folder.path)
    check_vocabulary(tokenizer, config.llama.vocab_size, folder.name)
    return tokenizer


def pick_device(name: str | None) -> torch.device:
    """The named device, by default CUDA if there is one.

    Raises:
        ConfigError: it does not exist.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name}: {str(error).splitlines()[0][:200]}; expected cpu, cuda or cuda:N, "
            "and for those a CUDA build of torch"
        ) from error
    if device.type == "meta":
        raise ConfigError(f"--device {name}: holds no values")
    return device
