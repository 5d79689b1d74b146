"""One change at a time in everything that a cache is made from, and where each must be noticed.

Each change is tried three times: a build is continued with it, a training run meets the cache with
it, and a cache built with it is merged into the other by copying.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from click.testing import Result
from safetensors.torch import save_file

from shared.cache import open_cache
from shared.errors import CacheError
from tests.student_train.support import STUDENT, arguments, train_student, write_recipe
from tests.support import (
    CLIP,
    FULL,
    TEACHER,
    annotation,
    command,
    encoded,
    invoke,
    picture,
    sample,
    text_sample,
    write_tar,
)

Named = str | None
"What the refusal must name; None where the change must be accepted."
NOT_THERE = "-"
"Where a change has no place: the student side knows nothing of it."


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that decides a cache's bytes, and the student that is to be trained on it."""

    folder: Path
    "Where this world's own files may lie."
    tars: tuple[Path, ...]
    "Of the build and the training."
    more: Path
    "A tar for the other cache of a merge."
    cache: Path
    "Built from the first world."
    run: Path
    "A finished training run on it."
    teacher: Path = TEACHER
    student: Path = STUDENT
    tower: Path = CLIP
    "Of both."
    spec: Mapping[str, Any] = field(default_factory=lambda: dict(FULL))
    recipe: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    "Further ones of build-cache."
    resume: bool = False
    "Whether training means to resume the run, with this world's cache in the place of the old."


Change = Callable[[World], World]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One change."""

    name: str
    "For people."
    change: Change
    "Gives the world after it."
    build: Named
    "When the build is continued."
    train: Named
    "When training starts, or the run is resumed."
    merge: Named
    "When both caches' files lie in one folder and it is opened."


def first_world(folder: Path) -> World:
    """The world before any change, its cache built and a run of one step finished on it."""
    tars = tuple(
        write_tar(folder / "tars" / f"t-{n}.tar", image_sample(f"image-{n}"), text_sample(f"x-{n}"))
        for n in range(2)
    )
    more = write_tar(folder / "tars" / "u.tar", sample("image-9"), text_sample("x-9"))
    world = World(
        folder=folder, tars=tars, more=more, cache=folder / "cache", run=folder / "run"
    )  # fmt: skip
    assert build(world, world.cache).exit_code == 0
    assert train(world, world.run).exit_code == 0
    return world


def image_sample(key: str, seed: int = 0, answer: str = "red") -> list[tuple[str, bytes]]:
    """A sample whose image file has the same size for any seed."""
    image = encoded(picture(seed), "PNG", compress_level=0)
    return sample(key, annotation(answer=answer), image)


# -- where a change is met -------------------------------------------------------------------------


def build(world: World, out: Path, *tars: Path) -> Result:
    """Build or continue a cache."""
    spec = world.folder / "spec.yaml"
    spec.write_text(json.dumps(world.spec))
    tower = ("--vision-tower", str(world.tower))
    return command(out, tars or world.tars, spec, world.teacher, *tower, *world.options)


def train(world: World, out: Path, *options: object) -> Result:
    """Train one step."""
    recipe = {"global_batch": 2, "micro_batch": 2, "max_steps": 1, "loss": {"layer_map": {0: 0}}}
    file = write_recipe(world.folder / "recipe.yaml", **recipe, **world.recipe)
    given = ("--student", world.student, "--vision-tower", world.tower, *options)
    return invoke(train_student, *arguments(out, world.tars, world.cache, file, *given))


def continue_build(world: World) -> str:
    """Continue the first world's cache; the last line."""
    result = build(world, world.cache)
    if result.exit_code == 0:
        assert "0 shards built, 2 were there" in result.stdout
    return result.stderr.splitlines()[-1] if result.exit_code else "accepted"


def start_training(world: World) -> str:
    """Start a run on the first world's cache, or resume one on this world's; the last line."""
    if world.resume:
        shutil.rmtree(world.folder / "own", ignore_errors=True)
        assert build(world, world.folder / "own").exit_code == 0
        world = dataclasses.replace(world, cache=world.folder / "own")
        result = train(world, world.run, "--resume")
    else:
        result = train(world, world.folder / "new-run")
    return result.stderr.splitlines()[-1] if result.exit_code else "accepted"


def merge(world: World) -> str:
    """Copy a cache of this world into the first world's cache and open it; the error."""
    other, merged = world.folder / "other", world.folder / "merged"
    assert build(world, other, world.more).exit_code == 0
    shutil.copytree(world.cache, merged)
    shutil.copytree(other, merged, dirs_exist_ok=True)
    try:
        cache = open_cache(merged)
        for key in cache.keys():  # noqa: SIM118  (a Cache is no dict)
            cache.read(key)
    except CacheError as error:
        return str(error)
    assert len(cache) == 6
    return "accepted"


# -- the changes -----------------------------------------------------------------------------------


def teacher_weight(world: World) -> World:
    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"].mul_(2)

    return _resumed(world, teacher=_edited(world, double))


def last_bit_of_a_weight(world: World) -> World:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["lm_head.weight"]
        weight.view(torch.uint8 if weight.element_size() == 1 else torch.int16).view(-1)[0] ^= 1

    return _resumed(world, teacher=_edited(world, flip))


def config(world: World) -> World:
    return _resumed(world, teacher=_configured(world, rope_theta=5000.0))


def config_of_the_tower(world: World) -> World:
    return _resumed(world, tower=_settings(world, "config.json", hidden_act="gelu"))


def vocabulary(world: World) -> World:
    """The same words in another order: every id would mean something else."""

    def swap(proto: Any) -> None:
        one, two = proto.pieces[-1], proto.pieces[-2]
        one.piece, two.piece = two.piece, one.piece

    return _tokenized(world, swap)


def tokenizer_behaviour(world: World) -> World:
    """The same vocabulary, other ids for the same text."""
    settings = {"add_eos_token": True}
    return dataclasses.replace(
        world,
        teacher=_settings(world, "tokenizer_config.json", TEACHER, **settings),
        student=_settings(world, "tokenizer_config.json", STUDENT, **settings),
    )


def image_mean(world: World) -> World:
    return dataclasses.replace(
        world, tower=_settings(world, "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    )


def resampling(world: World) -> World:
    return dataclasses.replace(
        world, tower=_settings(world, "preprocessor_config.json", resample=2)
    )


def template(world: World) -> World:
    return _spec(world, recipe={"template": "plain"}, template="plain")


def image_aspect(world: World) -> World:
    return _spec(world, recipe={"image_aspect": "square"}, image_aspect="square")


def longest_sample(world: World) -> World:
    return _resumed(_spec(world, max_tokens=1024))


def top_k(world: World) -> World:
    return _resumed(_spec(world, logprobs={"top_k": 8, "encoding": "float32"}))


def layers(world: World) -> World:
    return _resumed(_spec(world, attention={"layers": [0, 1], "encoding": "float32"}))


def encoding(world: World) -> World:
    return _resumed(_spec(world, vision_tokens={"encoding": "float16"}))


def number_format(world: World) -> World:
    return _resumed(world, options=("--dtype", "bfloat16"))


def tar_of_equal_size(world: World) -> World:
    """Other members, padded to the same number of bytes."""
    folder = world.folder / "changed"
    longer = image_sample("image-0", answer="blue")
    tar = write_tar(folder / "t-0.tar", longer, text_sample("x-0"))
    assert tar.stat().st_size == world.tars[0].stat().st_size
    return dataclasses.replace(
        world, tars=(tar, world.tars[1]), more=_renamed(tar, folder / "v.tar")
    )


def image_of_equal_size(world: World) -> World:
    """Members of the same names, places and sizes: their index is equal."""
    folder = world.folder / "changed"
    tar = write_tar(folder / "t-0.tar", image_sample("image-0", seed=7), text_sample("x-0"))
    return dataclasses.replace(
        world, tars=(tar, world.tars[1]), more=_renamed(tar, folder / "v.tar")
    )


def tar_of_other_size(world: World) -> World:
    large = sample("image-0", image=encoded(picture(size=(90, 90)), "PNG", compress_level=0))
    tar = write_tar(world.folder / "changed" / "t-0.tar", large, text_sample("x-0"))
    return dataclasses.replace(
        world, tars=(tar, world.tars[1]), more=_renamed(tar, world.folder / "changed" / "v.tar")
    )


# What must change nothing


def nothing(world: World) -> World:
    return world


def safetensors(world: World) -> World:
    return dataclasses.replace(
        world, teacher=_as_safetensors(world, TEACHER), student=_as_safetensors(world, STUDENT)
    )


def shuffled_files(world: World) -> World:
    """Each tensor in a file of its own, in reversed order."""
    folder = _copy(world, TEACHER)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    files = {name: f"part-{n}.bin" for n, name in enumerate(sorted(tensors, reverse=True))}
    for name, file in files.items():
        torch.save({name: tensors[name]}, folder / file)
    index = {"weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return dataclasses.replace(world, teacher=folder)


def moved_and_renamed(world: World) -> World:
    elsewhere = world.folder / "elsewhere"
    shutil.copytree(world.tars[0].parent, elsewhere / "boats")
    shutil.copytree(world.cache, elsewhere / "a cache")
    return dataclasses.replace(
        world,
        tars=tuple(elsewhere / "boats" / tar.name for tar in world.tars),
        more=elsewhere / "boats" / world.more.name,
        cache=elsewhere / "a cache",
        teacher=Path(shutil.copytree(TEACHER, elsewhere / "a teacher")),
        student=Path(shutil.copytree(STUDENT, elsewhere / "a student")),
        tower=Path(shutil.copytree(CLIP, elsewhere / "a tower")),
    )


def cosmetic_config(world: World) -> World:
    fields = {"transformers_version": "9", "use_cache": False, "mm_vision_tower": "x/y"}
    return dataclasses.replace(world, teacher=_configured(world, **fields))


def defaults_spelled_out(world: World) -> World:
    """The same image processor in other words."""
    path = CLIP / "preprocessor_config.json"
    edge = json.loads(path.read_text())["crop_size"]
    edge = edge["height"] if isinstance(edge, dict) else edge
    changed = {"crop_size": edge, "size": edge, "do_convert_rgb": True, "resample": 3}
    return dataclasses.replace(world, tower=_settings(world, path.name, **changed))


def batch_size(world: World) -> World:
    return dataclasses.replace(world, options=("--batch-size", "1"))


CASES = [
    Case(name="teacher weight", change=teacher_weight, build="teacher.weights_sha256: '",
         train="cache.teacher.weights_sha256 was '", merge="teacher.weights_sha256: '"),
    Case(name="teacher weight, lowest bit", change=last_bit_of_a_weight,
         build="teacher.weights_sha256: '", train="cache.teacher.weights_sha256 was '",
         merge="teacher.weights_sha256: '"),
    Case(name="config", change=config, build="teacher.config_sha256: '",
         train="cache.teacher.config_sha256 was '", merge="teacher.config_sha256: '"),
    Case(name="config of the tower", change=config_of_the_tower, build="teacher.config_sha256: '",
         train="cache.teacher.config_sha256 was '", merge="teacher.config_sha256: '"),
    Case(name="tokenizer, vocabulary", change=vocabulary, build="tokenizer.vocab_sha256: '",
         train="tokenizer.vocab_sha256: '", merge="tokenizer.vocab_sha256: '"),
    Case(name="tokenizer, behaviour", change=tokenizer_behaviour,
         build="tokenizer.behaviour_sha256: '", train="tokenizer.behaviour_sha256: '",
         merge="tokenizer.behaviour_sha256: '"),
    Case(name="template", change=template, build="spec.template: 'v1' there, 'plain' here",
         train="template: 'v1' there, 'plain' here", merge="spec.template: "),
    Case(name="image aspect", change=image_aspect, build="spec.image_aspect: 'pad' there, 'square'",
         train="image_aspect: 'pad' there, 'square' here", merge="spec.image_aspect: "),
    Case(name="image processor, mean", change=image_mean,
         build="image_processor.settings.image_mean: [",
         train="image_processor.settings.image_mean: [",
         merge="image_processor.settings.image_mean: ["),
    Case(name="image processor, filter", change=resampling,
         build="image_processor.settings.resample: 3 there, 2 here",
         train="image_processor.settings.resample: 3 there, 2 here",
         merge="image_processor.settings.resample: "),
    Case(name="spec, max_tokens", change=longest_sample,
         build="spec.max_tokens: 2048 there, 1024 here",
         train="cache.spec.max_tokens was 2048 and is 1024 now", merge="spec.max_tokens: "),
    Case(name="spec, top_k", change=top_k, build="spec.logprobs.top_k: 512 there, 8 here",
         train="cache.spec.logprobs.top_k was 512 and is 8 now", merge="spec.logprobs.top_k: "),
    Case(name="spec, layers", change=layers, build="spec.attention.layers: [0] there, [0, 1] here",
         train="cache.spec.attention.layers was [0] and is [0, 1] now",
         merge="spec.attention.layers: "),
    Case(name="spec, encoding", change=encoding,
         build="spec.vision_tokens.encoding: 'float32' there, 'float16' here",
         train="cache.spec.vision_tokens.encoding was 'float32' and is 'float16' now",
         merge="spec.vision_tokens.encoding: "),
    Case(name="number format", change=number_format,
         build="numerics.dtype: 'float32' there, 'bfloat16' here",
         train="cache.numerics.dtype was 'float32' and is 'bfloat16' now",
         merge="numerics.dtype: "),
    Case(name="tar, other members, same size", change=tar_of_equal_size,
         build="sha256: '", train="tar.t-0.tar.index_sha256: '",
         merge="stands in shard t-0 and in v"),
    Case(name="tar, an image of equal size", change=image_of_equal_size,
         build="sha256: '", train="sample 'image-0': its image in ",
         merge="stands in shard t-0 and in v"),
    Case(name="tar, other size", change=tar_of_other_size, build="size: ", train="size: ",
         merge="stands in shard t-0 and in v"),
    Case(name="nothing", change=nothing, build=None, train=None, merge=None),
    Case(name=".bin as safetensors", change=safetensors, build=None, train=None, merge=None),
    Case(name="weights in many files", change=shuffled_files, build=None, train=NOT_THERE,
         merge=None),
    Case(name="everything moved, renamed", change=moved_and_renamed, build=None, train=None,
         merge=None),
    Case(name="config fields of no effect", change=cosmetic_config, build=None, train=NOT_THERE,
         merge=None),
    Case(name="image processor, other words", change=defaults_spelled_out, build=None, train=None,
         merge=None),
    Case(name="batch size", change=batch_size, build=None, train=NOT_THERE, merge=None),
]  # fmt: skip


def _resumed(world: World, **changes: Any) -> World:
    return dataclasses.replace(world, resume=True, **changes)


def _spec(world: World, recipe: Mapping[str, Any] | None = None, **changes: Any) -> World:
    return dataclasses.replace(world, spec={**world.spec, **changes}, recipe=recipe or {})


def _copy(world: World, model: Path) -> Path:
    return Path(shutil.copytree(model, world.folder / "models" / model.name))


def _edited(world: World, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    folder = _copy(world, TEACHER)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    edit(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def _settings(world: World, file: str, source: Path = CLIP, **changes: Any) -> Path:
    folder = _copy(world, source)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def _configured(world: World, **changes: Any) -> Path:
    return _settings(world, "config.json", TEACHER, **changes)


def _tokenized(world: World, edit: Callable[[Any], None]) -> World:
    from sentencepiece import sentencepiece_model_pb2

    folders = [_copy(world, model) for model in (TEACHER, STUDENT)]
    for folder in folders:
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString((folder / "tokenizer.model").read_bytes())
        edit(proto)
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return dataclasses.replace(world, teacher=folders[0], student=folders[1])


def _as_safetensors(world: World, model: Path) -> Path:
    folder = _copy(world, model)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder


def _renamed(tar: Path, to: Path) -> Path:
    return Path(shutil.copy(tar, to))
