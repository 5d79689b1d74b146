"""What a GPU must give: the same as the CPU. `pytest -m gpu`; skipped where there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from cache_builder.arrays import ShardArrays
from cache_builder.build import build_cache
from cache_builder.cli import cache_tools
from cache_builder.setup import load_builder
from shared import encodings
from shared.cache import Cache, open_cache
from shared.encodings import ENCODINGS
from shared.spec import CacheSpec
from shared.tensor_encodings import decode, encode
from student_train.cli import train_student
from student_train.losses import cross_entropy_and_topk_kl
from student_train.training_set import TrainingSet
from tests.student_train.support import (
    aligned,
    arguments,
    batches_of,
    log_lines,
    recipe,
    training_set,
    write_recipe,
)
from tests.support import CLIP, FULL, TEACHER, invoke

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="no CUDA device")]


@pytest.fixture(params=sorted({0, max(GPUS - 1, 0)}))
def device(request: pytest.FixtureRequest) -> torch.device:
    """The first GPU and the last: streams and events are a device's own."""
    return torch.device("cuda", request.param)


def test_a_build_stores_what_a_build_on_the_cpu_stores(
    packed_tars: list[Path], cache: Cache, tmp_path: Path, device: torch.device
) -> None:
    built = load_builder(
        CacheSpec.from_dict(FULL), str(TEACHER), vision_tower=str(CLIP), device=str(device),
        dtype="float32", batch_size=2,
    )  # fmt: skip
    build_cache(built, packed_tars, tmp_path / "cache")

    found = open_cache(tmp_path / "cache")
    for key in cache.keys():  # noqa: SIM118  (a Cache is not a dict)
        ours, theirs = found.read(key), cache.read(key)
        np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)
        for layer, weights in theirs.attention.items():
            np.testing.assert_allclose(ours.attention[layer], weights, rtol=1e-4, atol=1e-6)
        if theirs.vision_tokens is not None:
            np.testing.assert_allclose(ours.vision_tokens, theirs.vision_tokens, atol=1e-4)
        np.testing.assert_allclose(ours.top_logprobs, theirs.top_logprobs, atol=1e-4)


def test_rows_are_taken_once_the_device_has_made_them(device: torch.device) -> None:
    numbers = torch.arange(2**20, device=device).reshape(-1, 16)
    arrays = ShardArrays({"query": {"a": len(numbers)}})
    with torch.cuda.device(device):
        torch.cuda._sleep(10**9)  # about half a second in which the copy cannot have begun
        arrays.put("x", ("query", "y"), ["a"], 2 * numbers)

    found = arrays.take({"query": ["a"]})["x"].values

    np.testing.assert_array_equal(found, 2 * np.arange(2**20).reshape(-1, 16))


@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_decoding_gives_the_bits_of_numpy(name: str, device: torch.device) -> None:
    values = torch.rand(7, 5, 16, generator=torch.Generator().manual_seed(0))
    values = -values if ENCODINGS[name].family == "logprob" else values
    parts = encode(name, values)

    found = decode(name, {suffix: part.to(device) for suffix, part in parts.items()})

    expected = encodings.decode(name, {suffix: part.numpy() for suffix, part in parts.items()})
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_what_the_device_encodes_is_as_near_as_what_the_cpu_encodes(
    name: str, device: torch.device
) -> None:
    values = torch.rand(7, 5, 16, generator=torch.Generator().manual_seed(0))
    values = -values if ENCODINGS[name].family == "logprob" else values
    errors = []
    for place in (torch.device("cpu"), device):
        parts = {suffix: part.cpu() for suffix, part in encode(name, values.to(place)).items()}
        errors.append((decode(name, parts) - values).norm() / values.norm())

    assert errors[1] <= 1.01 * errors[0]  # sums of a fit round otherwise


def test_a_teacher_in_bfloat16_builds_a_whole_cache_in_the_default_encodings(
    packed_tars: list[Path], cache: Cache, tmp_path: Path, device: torch.device
) -> None:
    spec = CacheSpec.from_dict(FULL | {
        "attention": {"layers": [0], "encoding": "sqrt6"},
        "vision_tokens": {"encoding": "channel6"},
        "logprobs": {"top_k": 64, "encoding": "logprob8"},
    })  # fmt: skip
    built = load_builder(
        spec, str(TEACHER), vision_tower=str(CLIP), device=str(device), dtype="bfloat16",
        batch_size=None,
    )  # fmt: skip
    build_cache(built, packed_tars, tmp_path / "cache")

    result = invoke(
        cache_tools, "verify", str(tmp_path / "cache"), "--decode", "--teacher", str(TEACHER),
        "--vision-tower", str(CLIP), "--device", str(device),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = open_cache(tmp_path / "cache")
    for key in cache.keys():  # noqa: SIM118  (a Cache is not a dict)
        ours, theirs = found.read(key).vision_tokens, cache.read(key).vision_tokens
        if ours is not None and theirs is not None:
            assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)


def test_a_student_trains_in_bfloat16_from_a_loader_that_pins(
    packed_tars: list[Path], cache: Cache, tmp_path: Path
) -> None:
    settings = {
        "template": cache.spec.template, "image_aspect": cache.spec.image_aspect, "workers": 1,
        "global_batch": 2, "micro_batch": 1, "max_steps": 2, "log_every": 1,
        "gradient_checkpointing": True, "loss": {"focus_tokens": 4},
    }  # fmt: skip
    losses = []
    for name, precision in (("cpu", "float32"), ("gpu", "bfloat16")):
        out = tmp_path / name
        file = write_recipe(tmp_path / f"{name}.yaml", precision=precision, **settings)
        given = arguments(out, packed_tars, cache.root, file, "--eval-data", packed_tars[0])

        result = invoke(train_student, *[w for w in given if w != "--cpu" or name == "cpu"])

        assert result.exit_code == 0, result.output
        losses.append([line["loss"] for line in log_lines(out) if "loss" in line])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)
    weights = torch.load(tmp_path / "gpu" / "export" / "pytorch_model.bin", weights_only=True)
    assert {tensor.device.type for tensor in weights.values()} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_over_the_vocabulary_are_those_of_the_cpu(
    dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(9, 500, generator=generator)).to(dtype)
    logprobs = torch.randn(9, 500, generator=generator).log_softmax(-1)
    top, ids = logprobs.topk(20)
    rest = logprobs.scatter(-1, ids, float("-inf")).logsumexp(-1)
    labels = torch.arange(9)
    results = []
    for place in (torch.device("cpu"), device):
        ours = logits.clone().to(place).requires_grad_()
        target = (labels.to(place), ids.to(place), top.to(place), rest.to(place))
        losses = torch.stack(cross_entropy_and_topk_kl(ours, *target, "reverse"))
        losses.sum().backward()
        assert ours.grad is not None
        results.append((losses.detach().cpu(), ours.grad.float().cpu()))

    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-2 if dtype.itemsize < 4 else 1e-4, atol=1e-5
        )


def test_a_pinned_batch_gives_the_losses_of_the_cpu(
    packed_tars: list[Path], cache: Cache, device: torch.device
) -> None:
    changed = recipe(
        template=cache.spec.template, image_aspect=cache.spec.image_aspect,
        loss={"focus_tokens": 4},
    )  # fmt: skip
    samples: TrainingSet = training_set(packed_tars, changed, cache)
    (batch,) = batches_of(samples, range(len(samples)), len(samples))
    expected = aligned(changed, cache)(batch)

    found = aligned(changed, cache).to(device)(batch.pin_memory().to(device))

    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-4, atol=1e-6)
