"""Pixels are those of the original code: padding, colour, and sizes that invite mistakes."""

import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.errors import UnusableSample
from shared.images import ImageProcessor, decode_image, pad_to_square
from tests.support import CLIP, encoded, picture

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
COLOR = tuple(int(value * 255) for value in MEAN)


@pytest.fixture(scope="module")
def pad() -> ImageProcessor:
    return ImageProcessor(CLIP, "pad")


@pytest.fixture(scope="module")
def square() -> ImageProcessor:
    return ImageProcessor(CLIP, "square")


@pytest.mark.parametrize(
    ("size", "corner"),
    [((30, 20), (0, 5)), ((20, 30), (5, 0)), ((31, 20), (0, 5)), ((7, 30), (11, 0))],
)
def test_padding_puts_the_image_in_the_middle_of_the_mean_colour(
    size: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = picture(size=size)
    left, top = corner

    found = pad_to_square(image, MEAN)

    assert found.size == (max(size), max(size))
    box = (left, top, left + size[0], top + size[1])
    assert found.crop(box).tobytes() == image.tobytes()
    values = np.array(found).copy()
    values[top : top + size[1], left : left + size[0]] = COLOR
    assert (values == COLOR).all()


def test_a_square_image_is_not_padded() -> None:
    image = picture(size=(9, 9))

    assert pad_to_square(image, MEAN) is image


def test_the_padding_is_near_zero_after_normalising(pad: ImageProcessor) -> None:
    found = pad(picture(size=(60, 20)))

    assert found.shape == (3, 336, 336)
    assert np.abs(found[:, :100]).max() < 0.02  # one step of 1/255, over the deviation
    assert np.abs(found[:, 150:180]).max() > 1


def test_square_crops_the_middle_and_pad_keeps_all(
    pad: ImageProcessor, square: ImageProcessor
) -> None:
    image = Image.new("RGB", (90, 30), (255, 0, 0))
    image.paste((0, 0, 255), (30, 0, 60, 30))  # the middle third is blue

    cropped, whole = square(image), pad(image)

    blue = np.array([(0 - MEAN[0]) / STD[0], (0 - MEAN[1]) / STD[1], (1 - MEAN[2]) / STD[2]])
    np.testing.assert_allclose(cropped[:, 100:200, 100:200].mean((1, 2)), blue, atol=1e-4)
    assert whole[0].max() > 1.9 > cropped[0][:, 100:200].max()  # the red is still there


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 3), (3, 1), (2, 3), (3, 200), (200, 3)])
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_a_tiny_image_is_not_taken_for_one_of_channels_first(
    size: tuple[int, int], aspect: str
) -> None:
    """Three pixels a side look like three channels to code that guesses."""
    color = (255, 128, 0)
    found = ImageProcessor(CLIP, aspect)(Image.new("RGB", size, color))  # type: ignore[arg-type]

    middle = found[:, 168, 168]
    expected = [(c / 255 - m) / s for c, m, s in zip(color, MEAN, STD, strict=True)]
    np.testing.assert_allclose(middle, expected, atol=0.02)  # a step of 1/255


def test_the_same_image_gives_the_same_pixels(pad: ImageProcessor) -> None:
    assert pad(picture(4)).tobytes() == pad(picture(4)).tobytes()


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("RGBA", "WEBP"),
     ("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("L", "JPEG")],
)  # fmt: skip
def test_every_eight_bit_mode_becomes_rgb(mode: str, form: str) -> None:
    found = decode_image(encoded(picture(mode=mode), form))

    assert (found.mode, found.size) == ("RGB", (20, 30))


def test_a_palette_with_transparent_entries_is_read_without_a_warning() -> None:
    image = picture(mode="P")

    found = decode_image(encoded(image, transparency=bytes(range(256))))

    assert found.tobytes() == image.convert("RGB").tobytes()


def test_a_cmyk_image_keeps_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (250, 10, 10))

    found = decode_image(encoded(red.convert("CMYK"), "JPEG", quality=95))

    assert np.abs(np.array(found).mean((0, 1)) - (250, 10, 10)).max() < 12


def test_a_photo_with_a_preview_is_its_first_picture() -> None:
    """Phones write MPO: a JPEG with more frames behind it."""
    red, blue = (Image.new("RGB", (16, 16), color) for color in ((250, 10, 10), (10, 10, 250)))
    photo = encoded(red, "MPO", save_all=True, append_images=[blue])
    assert Image.open(io.BytesIO(photo)).n_frames == 2  # type: ignore[attr-defined]

    found = np.array(decode_image(photo))

    assert np.abs(found.mean((0, 1)) - (250, 10, 10)).max() < 5


def test_the_identity_is_that_of_the_settings_and_not_of_the_folder(tmp_path: Path) -> None:
    shutil.copytree(CLIP, tmp_path / "clip")
    same = ImageProcessor(tmp_path / "clip", "pad").identity
    assert same == ImageProcessor(CLIP, "pad").identity != ImageProcessor(CLIP, "square").identity

    path = tmp_path / "clip" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "resample": 2}))

    assert ImageProcessor(tmp_path / "clip", "pad").identity != same


def chunk(kind: bytes, content: bytes) -> bytes:
    """One piece of a PNG."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_that_says(width: int, height: int, *more: bytes) -> bytes:
    """A few bytes that claim to be a large picture."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png_that_says(10_000, 10_000), "image beyond"),
        (png_that_says(2**31 - 1, 2**31 - 1), "image beyond"),
        (png_that_says(100_000, 100), "too long and thin"),
        (png_that_says(0, 0), "image is broken"),
        (png_that_says(9, 9, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27)))), "broken"),
        (png_that_says(9, 9, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**27)))), "broken"),
    ],
)
def test_a_bomb_is_a_reason_to_skip(content: bytes, reason: str) -> None:
    with pytest.raises(UnusableSample, match=reason):
        decode_image(content)
