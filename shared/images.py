"""Image bytes -> pixels for the vision tower, as the original code prepares them.

`pad` puts the image in the middle of a square of the mean colour; `square` leaves it to the image
processor, which resizes the shorter edge and crops the middle. Both are MobileVLM's; both are
deterministic.
"""

import hashlib
import io
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image, UnidentifiedImageError

from shared.errors import CheckpointError, UnusableSample
from shared.readable import reading
from shared.spec import Aspect

# What it warns of is refused. Here, not around each image: threads share the filters.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

FORMATS = ("JPEG", "PNG", "WEBP")
_EFFECTIVE = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std", "do_convert_rgb",
)  # fmt: skip
"Settings that decide pixels."


def decode_image(encoded: bytes) -> Image.Image:
    """One RGB image.

    Raises:
        UnusableSample: empty, broken, animated, too large for Pillow's bomb limit, or of a pixel
            type that 8-bit RGB would clip.
    """
    if not encoded:
        raise UnusableSample("image of zero bytes")
    try:
        opened = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _refuse(opened)
        image: Image.Image = opened
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours; at once, Pillow warns of lost alpha
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UnusableSample("image is broken or not JPEG, PNG or WebP") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnusableSample(f"image beyond {Image.MAX_IMAGE_PIXELS} pixels") from error
    # Pillow's decoders raise all of these on damaged data.
    except (
        OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
        RuntimeError, struct.error, zlib.error,
    ) as error:  # fmt: skip
        raise UnusableSample(f"image is broken ({error})") from error


def _refuse(image: Image.Image) -> None:
    # A phone's JPEG may hold a preview as second frame (MPO); its first frame is the picture.
    if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
        raise UnusableSample(f"animated image of {image.n_frames} frames")  # type: ignore[attr-defined]
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    if image.mode.startswith(("I", "F")):
        raise UnusableSample(f"image of mode {image.mode}: 8-bit RGB would clip its values")
    longest, shortest = max(image.size), min(image.size)
    # `pad` makes a square of the longest edge, `square` resizes by the shortest.
    if longest * longest > 4 * (Image.MAX_IMAGE_PIXELS or longest * longest) or (
        longest > 200 * shortest
    ):
        raise UnusableSample(f"image of {image.width} x {image.height} is too long and thin")


class ImageProcessor:
    """CLIP's preprocessing with an aspect rule in front of it."""

    def __init__(self, folder: Path, aspect: Aspect) -> None:
        """Settings from `folder/preprocessor_config.json`.

        Raises:
            CheckpointError: the file is missing or no CLIP image processor's.
        """
        path = folder / "preprocessor_config.json"
        try:
            with reading(path, CheckpointError):
                settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        # The torchvision class rounds pixels differently (up to 1/255), so the class is fixed.
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        if not isinstance(settings, dict):
            raise CheckpointError(f"{path}: expected a JSON object")
        settings.pop("image_processor_type", None)
        try:
            self._processor: CLIPImageProcessorPil = CLIPImageProcessorPil(**settings)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not settings of a CLIP image processor ({error})"
            ) from error
        # As the processor understands them: a file may leave defaults out or write 336 for a pair.
        effective = self._processor.to_dict()
        self._settings = json.loads(json.dumps({name: effective[name] for name in _EFFECTIVE}))
        self._aspect = aspect

    @property
    def identity(self) -> dict[str, Any]:
        """Class, settings and aspect: equal iff pixels will be equal."""
        return {
            "class": type(self._processor).__name__,
            "settings": self._settings,
            "aspect": self._aspect,
        }

    @property
    def size(self) -> int:
        """Edge of the square that comes out, in pixels."""
        return int(self._processor.crop_size["height"])

    def __call__(self, image: Image.Image) -> Float32[np.ndarray, "3 S S"]:
        """Normalised pixels of one RGB image."""
        if self._aspect == "pad":
            image = pad_to_square(image, self._processor.image_mean)
        pixels = self._processor(image, return_tensors="np")["pixel_values"][0]
        return np.asarray(pixels, dtype=np.float32)


def pixels_digest(pixels: Float32[np.ndarray, "3 S S"]) -> str:
    """sha256 over the pixels as little endian float32, channel by channel, row by row."""
    return hashlib.sha256(np.ascontiguousarray(pixels, dtype="<f4").tobytes()).hexdigest()


def pad_to_square(image: Image.Image, mean: Any) -> Image.Image:
    """`image` in the middle of a square whose colour is `mean` (three values in 0..1)."""
    size = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (size, size), tuple(int(value * 255) for value in mean))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square
