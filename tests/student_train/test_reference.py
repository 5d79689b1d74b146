"""The losses agree with what the original code computed (`tests/reference`), from a cache that
`build-cache` wrote of the reference teacher.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.cache import Cache, open_cache
from shared.tensor_encodings import decode
from student_train.batch import TrainingBatch
from student_train.losses import focused_vision
from student_train.student import AlignedStudent
from tests.student_train.support import aligned, recipe, training_set
from tests.support import FULL, REFERENCE, command

CASES = {case["key"]: case for case in json.loads((REFERENCE / "golden.json").read_text())["cases"]}
WITH_IMAGE = [key for key, case in CASES.items() if case["has_image"]]
GOLDEN = load_file(REFERENCE / "golden.safetensors")
SCALARS = {"sup": "student_ce", "kl": "reverse_kl_response", "attention": "attn_mse",
           "vision_all": "v_all", "vision_focus": "v_focus"}  # fmt: skip


@pytest.fixture(scope="module")
def caches(packed_tars: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cache]:
    folder = tmp_path_factory.mktemp("reference")
    for template in ("plain", "v1"):
        result = command(folder / template, packed_tars, {**FULL, "template": template})
        assert result.exit_code == 0, result.output
    return {template: open_cache(folder / template) for template in ("plain", "v1")}


def student_and_batch(
    case: str, caches: dict[str, Cache], tars: list[Path], **loss: Any
) -> tuple[AlignedStudent, TrainingBatch]:
    """The reference student with the reference adapters, and the case as a batch of one."""
    template, key = case.split("/")
    changed = recipe(template=template, loss=loss)
    student = aligned(changed, caches[template]).eval()
    assert student.adapters is not None
    student.adapters.load_state_dict(
        {
            "attention.0.weight": GOLDEN["attn_adapter.weight"],
            "attention.0.bias": GOLDEN["attn_adapter.bias"],
            "vision.weight": GOLDEN["proj_adapter.weight"][..., 0],
            "vision.bias": GOLDEN["proj_adapter.bias"],
        }
    )
    samples = training_set(tars, changed, caches[template])
    keys = [entry.key for _, entry in samples.entries]
    return student, samples[[keys.index(key)]]


@pytest.mark.parametrize("case", CASES)
def test_every_loss_term_is_the_originals(
    case: str, caches: dict[str, Cache], packed_tars: list[Path]
) -> None:
    student, batch = student_and_batch(case, caches, packed_tars)

    with torch.no_grad():
        terms = student(batch)
    means = {
        name: float(terms[name] / count)
        for name, count in zip(SCALARS, student.counts(batch).tolist(), strict=True)
        if name in terms
    }

    golden = CASES[case]
    expected = {name: golden[scalar] for name, scalar in SCALARS.items() if scalar in golden}
    assert means == pytest.approx(expected, rel=1e-4)
    assert len(expected) == (5 if golden["has_image"] else 2)


@pytest.mark.parametrize("case", CASES)
def test_the_forward_kl_is_the_originals(
    case: str, caches: dict[str, Cache], packed_tars: list[Path]
) -> None:
    student, batch = student_and_batch(case, caches, packed_tars, kl_direction="forward")

    with torch.no_grad():
        found = float(student(batch)["kl"]) / CASES[case]["n_response_positions"]

    assert found == pytest.approx(CASES[case]["forward_kl_response"], rel=1e-4)


@pytest.mark.parametrize("case", WITH_IMAGE)
def test_the_focused_vision_tokens_are_the_originals_top_16(
    case: str, caches: dict[str, Cache], packed_tars: list[Path]
) -> None:
    _, batch = student_and_batch(case, caches, packed_tars)
    assert batch.targets is not None

    attention = decode("float32", batch.targets.attention[0]).transpose(1, 2)
    found = focused_vision(attention, batch.row_mask, 16)

    assert sorted(found[0].tolist()) == CASES[case]["top16"]


def test_terms_of_one_batch_are_the_means_of_its_cases(
    caches: dict[str, Cache], packed_tars: list[Path]
) -> None:
    """All four `v1` samples at once: padding and the text-only sample change nothing."""
    student, _ = student_and_batch("v1/s0", caches, packed_tars)
    batch = training_set(packed_tars, recipe(loss={}), caches["v1"])[[0, 1, 2, 3]]
    cases = [case for key, case in CASES.items() if key.startswith("v1/")]

    with torch.no_grad():
        terms = student(batch)

    for name, scalar in SCALARS.items():
        weight = "n_response_positions" if name in ("sup", "kl") else "has_image"
        expected = sum(case[weight] * case.get(scalar, 0.0) for case in cases)
        assert float(terms[name]) == pytest.approx(expected, rel=1e-4), name
