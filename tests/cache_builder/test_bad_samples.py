"""A sample that cannot be used is skipped and listed with its reason; the others are stored."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from shared.cache import Cache, open_cache
from tests.support import (
    ATTENTION,
    FULL,
    LOGPROBS,
    Member,
    annotation,
    build,
    command,
    encoded,
    picture,
    png,
    sample,
    skipped,
    teacher_copy,
    text_sample,
    write_tar,
)

LONG = " ".join(["boat"] * 3000)


def turns(*roles_and_texts: tuple[object, object]) -> dict[str, object]:
    messages = [{"from": role, "value": text} for role, text in roles_and_texts]
    return {"id": "x", "conversations": messages}


def animated(form: str) -> bytes:
    frames = [picture(seed) for seed in range(3)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


def deep_gray() -> bytes:
    values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    return encoded(Image.fromarray(values))


BAD: dict[str, tuple[list[Member], str]] = {
    # The tar
    "image-alone": ([("image-alone.png", png())], "no .json beside it"),
    "image-named-but-absent": (
        sample("image-named-but-absent", annotation(image="boat.png"), image=None),
        "image 'boat.png' is not in the tar",
    ),
    "two-images-beside": (
        [*sample("two-images-beside"), ("two-images-beside.jpg", png())],
        "more than one image",
    ),
    # The image
    "broken": (sample("broken", image=png()[:-200]), "image is broken"),
    "broken-head": (sample("broken-head", image=b"\x89PNG" + png()), "image is broken or not"),
    "gif": (sample("gif", image=encoded(picture(), "GIF")), "not JPEG, PNG or WebP"),
    "zero-bytes": (sample("zero-bytes", image=b""), "image of zero bytes"),
    "gray-16": (sample("gray-16", image=deep_gray()), "image of mode I;16"),
    "animated-png": (sample("animated-png", image=animated("PNG")), "animated image of 3 frames"),
    "animated-webp": (
        sample("animated-webp", image=animated("WEBP"), suffix="webp"),
        "animated image of 3 frames",
    ),
    "thin": (sample("thin", image=png(size=(2000, 2))), "2000 x 2 is too long and thin"),
    # The JSON
    "list": (sample("list", [annotation()]), "JSON is not an object but list"),
    "null": (sample("null", b"null"), "JSON is not an object but NoneType"),
    "not-json": (sample("not-json", b"{boat"), "JSON cannot be parsed"),
    "not-utf8": (sample("not-utf8", b'{"id": "\xff\xfe"}'), "JSON cannot be parsed"),
    "empty-json": (sample("empty-json", b""), "JSON cannot be parsed"),
    "nested": (sample("nested", b"[" * 200_000), "JSON cannot be parsed"),
    # The conversation
    "no-conversations": (sample("no-conversations", {"id": "x"}), "no conversations"),
    "empty-conversations": (sample("empty-conversations", turns()), "no conversations"),
    "odd-role": (sample("odd-role", turns(("user", "<image>"), ("gpt", "red"))), "odd role 'user'"),
    "two-questions": (
        sample("two-questions", turns(("human", "<image>"), ("human", "why"), ("gpt", "red"))),
        "odd roles: message 1 is from 'human' again",
    ),
    "no-answer": (sample("no-answer", turns(("human", "<image>"))), "no answer"),
    "only-answer": (sample("only-answer", turns(("gpt", "red"))), "no question"),
    "empty-answer": (sample("empty-answer", annotation(answer="  \n")), "empty answer"),
    "no-text": (sample("no-text", turns(("human", None), ("gpt", "red"))), "without text"),
    "message-is-text": (
        sample("message-is-text", {"conversations": ["what", "red"]}),
        "a message is not an object",
    ),
    "half-character": (
        sample("half-character", annotation("<image>\n\ud800 boat")),
        "half of a character",
    ),
    # <image>
    "mark-without-image": (
        sample("mark-without-image", image=None),
        "<image> in the text but no image",
    ),
    "image-without-mark": (
        sample("image-without-mark", annotation("what color is the boat")),
        "an image but no <image> in the text",
    ),
    "two-image-names": (
        sample("two-image-names", annotation(image=["a.png", "b.png"])),
        "more than one image",
    ),
    "two-marks": (sample("two-marks", annotation("<image><image> what")), "2 <image> marks"),
    "marks-in-two-turns": (
        sample("marks-in-two-turns", annotation("<image>", "red", "<image> why", "so")),
        "2 <image> marks",
    ),
    "mark-in-answer": (
        sample("mark-in-answer", annotation("what is it", "a <image>")),
        "<image> in an answer",
    ),
    # The template
    "too-long": (sample("too-long", annotation(f"<image>\n{LONG}")), "tokens, at most 2048"),
    "end-token": (sample("end-token", annotation(answer="red</s>")), "holds '</s>'"),
    "begin-token": (sample("begin-token", annotation("<image>\n<s> boat")), "holds '<s>'"),
    "template-word": (
        sample("template-word", annotation("<image>\nboat ASSISTANT: red")),
        "holds 'ASSISTANT:'",
    ),
}

GOOD: dict[str, list[Member]] = {
    "one-pixel": sample("one-pixel", image=png(size=(1, 1))),
    "cmyk": sample("cmyk", image=encoded(picture(mode="CMYK"), "JPEG"), suffix="jpg"),
    "gray": sample("gray", image=encoded(picture(mode="L"))),
    "transparent": sample("transparent", image=encoded(picture(mode="RGBA"))),
    "palette": sample("palette", image=encoded(picture(mode="P"))),
    "webp": sample("webp", image=encoded(picture(), "WEBP"), suffix="webp"),
    "upper-case": sample("upper-case", image=encoded(picture(), "JPEG"), suffix="JPEG"),
    "starts-with-answer": sample(
        "starts-with-answer", turns(("gpt", "hello"), ("human", "<image>"), ("gpt", "red"))
    ),
    "image-alone-in-question": sample("image-alone-in-question", annotation("<image>")),
    "unicode": sample("unicode", annotation("<image>\n中文 😀 é", "да")),
    "text": text_sample("text"),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache built from good and bad samples in turn."""
    folder = tmp_path_factory.mktemp("mixed")
    members = [members for members, _ in BAD.values()]
    for number, good in enumerate(GOOD.values()):
        members.insert(3 * number, good)
    result = command(folder / "cache", write_tar(folder / "mixed.tar", *members))
    assert result.exit_code == 0, result.output
    assert f"{len(GOOD)} samples stored, {len(BAD)} skipped" in result.stdout
    return folder / "cache"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache built from the good samples only."""
    folder = tmp_path_factory.mktemp("clean")
    build(folder / "cache", write_tar(folder / "clean.tar", *GOOD.values()))
    return open_cache(folder / "cache")


@pytest.mark.parametrize("key", BAD)
def test_a_bad_sample_is_listed_with_its_reason(mixed: Path, key: str) -> None:
    assert BAD[key][1] in skipped(mixed, "mixed")[key]


def test_only_bad_samples_are_skipped(mixed: Path) -> None:
    assert set(skipped(mixed, "mixed")) == set(BAD)
    assert open_cache(mixed).keys() == list(GOOD)


@pytest.mark.parametrize("key", GOOD)
def test_bad_neighbours_change_nothing_for_a_good_sample(
    mixed: Path, clean: Cache, key: str
) -> None:
    found, expected = open_cache(mixed).read(key), clean.read(key)

    np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert found.attention.keys() == expected.attention.keys()
    for layer, values in expected.attention.items():
        np.testing.assert_allclose(found.attention[layer], values, rtol=1e-5, atol=1e-7)
    if expected.vision_tokens is not None:
        np.testing.assert_allclose(
            found.vision_tokens, expected.vision_tokens, rtol=1e-5, atol=1e-6
        )


def test_an_image_beyond_pillows_bomb_limit_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = write_tar(
        tmp_path / "t.tar",
        sample("large", image=png(size=(40, 40))),
        sample("bomb", image=png(size=(400, 400))),
        sample("small", image=png(size=(20, 20))),
        sample("wide", image=png(size=(90, 5))),  # few pixels, but `pad` would make 8100 of them
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)

    build(tmp_path / "cache", tar)

    assert skipped(tmp_path / "cache", "t") == {
        "large": "image beyond 1000 pixels",
        "bomb": "image beyond 1000 pixels",
        "wide": "image of 90 x 5 is too long and thin",
    }
    assert open_cache(tmp_path / "cache").keys() == ["small"]


def test_a_broken_image_costs_every_sample_that_shows_it_and_no_other(tmp_path: Path) -> None:
    broken = png()[:-100]
    tar = write_tar(
        tmp_path / "t.tar", sample("a", image=broken), sample("b"), sample("c", image=broken)
    )

    build(tmp_path / "cache", tar)

    assert set(skipped(tmp_path / "cache", "t")) == {"a", "c"}


def test_duplicate_keys_in_a_tar_are_skipped_and_named(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "t.tar",
        sample("adjacent"), sample("adjacent"), sample("apart"), sample("good"), sample("apart"),
    )  # fmt: skip

    build(tmp_path / "cache", tar)

    found = skipped(tmp_path / "cache", "t")
    assert set(found) == {"adjacent", "apart"}
    assert all("duplicate key" in reason for reason in found.values())
    assert open_cache(tmp_path / "cache").keys() == ["good"]


def test_a_sample_whose_files_lie_apart_is_not_called_two_samples(tmp_path: Path) -> None:
    (json_a, png_a), (json_b, png_b) = sample("a"), sample("b")
    tar = write_tar(tmp_path / "t.tar", [png_a], [png_b], [json_a], [json_b])

    build(tmp_path / "cache", tar)

    reasons = set(skipped(tmp_path / "cache", "t").values())
    assert reasons == {"its files do not lie side by side in the tar (tar --sort=name)"}


def test_the_token_limit_counts_vision_tokens(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("image"), text_sample("text"))
    build(tmp_path / "all", tar)
    length = int(open_cache(tmp_path / "all").lengths[0])

    build(tmp_path / "fits", tar, {**FULL, "max_tokens": length})
    build(tmp_path / "short", tar, {**FULL, "max_tokens": length - 1})

    assert open_cache(tmp_path / "fits").keys() == ["image", "text"]
    assert skipped(tmp_path / "short", "t") == {"image": f"{length} tokens, at most {length - 1}"}


@pytest.mark.parametrize(
    ("spec", "signal"),
    [
        ({"attention": ATTENTION}, "attention of layer 0"),
        ({"logprobs": LOGPROBS}, "log-probabilities"),
    ],
)
def test_nan_in_the_teachers_output_costs_only_the_samples_that_have_it(
    tmp_path: Path, spec: dict[str, object], signal: str
) -> None:
    tar = write_tar(
        tmp_path / "t.tar",
        sample("good", annotation("<image>\nwhat", "red")),
        sample("bad", annotation("<image>\nwhat", "purple")),
        text_sample("also-good", "what", "red"),
    )
    base = {"template": "v1", "image_aspect": "pad", **spec}
    build(tmp_path / "healthy", tar, base)
    healthy = open_cache(tmp_path / "healthy")
    only_in_bad = set(healthy.read("bad").input_ids.tolist()) - {
        token for key in ("good", "also-good") for token in healthy.read(key).input_ids.tolist()
    }

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][sorted(only_in_bad)] = float("nan")

    teacher = teacher_copy(tmp_path / "teacher", edit=poison)

    build(tmp_path / "cache", tar, base, teacher)

    assert skipped(tmp_path / "cache", "t") == {
        "bad": f"the teacher's {signal} holds NaN or infinity"
    }
    found = open_cache(tmp_path / "cache")
    assert found.keys() == ["good", "also-good"]
    for key in found.keys():  # noqa: SIM118  (a Cache is not a dict)
        for layer, values in healthy.read(key).attention.items():
            np.testing.assert_allclose(found.read(key).attention[layer], values, rtol=1e-5)


def test_nan_in_vision_tokens_is_named_and_text_is_stored(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("image"), text_sample("text"))
    teacher = teacher_copy(
        tmp_path / "teacher",
        edit=lambda tensors: tensors["model.mm_projector.mlp.mlp.0.bias"].fill_(float("nan")),
    )

    build(tmp_path / "cache", tar, FULL, teacher)

    reason = "NaN or infinity in the teacher's vision tokens"
    assert skipped(tmp_path / "cache", "t") == {"image": reason}
    assert open_cache(tmp_path / "cache").keys() == ["text"]


def test_values_beyond_float16_are_skipped_not_stored_as_infinity(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", sample("image"), text_sample("text"))
    teacher = teacher_copy(
        tmp_path / "teacher",
        edit=lambda tensors: tensors["model.mm_projector.peg.peg.0.bias"].fill_(70000.0),
    )
    spec = {**FULL, "vision_tokens": {"encoding": "float16"}}

    build(tmp_path / "cache", tar, spec, teacher)

    assert "beyond float16's largest value 65504" in skipped(tmp_path / "cache", "t")["image"]
    assert open_cache(tmp_path / "cache").keys() == ["text"]


def test_skips_can_be_read_in_the_record_as_json(mixed: Path) -> None:
    values = json.loads((mixed / "records" / "mixed.json").read_text())

    assert {"key": "zero-bytes", "reason": "image of zero bytes"} in values["skipped"]


def test_a_sample_that_is_lost_late_leaves_every_other_with_its_own_image(tmp_path: Path) -> None:
    """The lost one is the first to show an image that a later one shows too."""
    tar = write_tar(
        tmp_path / "t.tar",
        sample("lost", annotation("<image>\nwhat", "purple"), png(1)),
        sample("other", annotation("<image>\nwhat", "red"), png(2)),
        sample("same", annotation("<image>\nwhat", "red"), png(1)),
    )
    build(tmp_path / "healthy", tar)
    healthy = open_cache(tmp_path / "healthy")
    ids = {key: set(healthy.read(key).input_ids.tolist()) for key in ("lost", "other")}

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][sorted(ids["lost"] - ids["other"])] = float("nan")

    build(tmp_path / "cache", tar, FULL, teacher_copy(tmp_path / "teacher", edit=poison))

    found = open_cache(tmp_path / "cache")
    assert found.keys() == ["other", "same"]
    for key in ("other", "same"):
        np.testing.assert_array_equal(
            found.read(key).vision_tokens, healthy.read(key).vision_tokens
        )
