"""One picture per example: the image, then where each model's text looks and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

_PANEL = 2.5
"Inches."
_RIGHT, _WRONG, _QUIET = "#1a7f37", "#cf222e", "#57606a"
_SHOWN = 384
"Pixels of an image's longer edge, so that small ones stay sharp beside smooth maps."


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What one model made of the question."""

    who: str
    "Title of its panel."
    answer: str
    "Its greedy answer."
    attention: Float[np.ndarray, "row column"]
    "Text-to-vision attention on the grid of vision tokens, mean over heads and text rows."


def draw(
    image: UInt8[np.ndarray, "height width 3"],
    question: str,
    answer: str,
    models: Sequence[Answered],
    path: Path,
) -> None:
    """Write a PNG: the image with the true answer, then one panel per model.

    Every panel has a colour scale of its own, from its least to its most attended token, because
    the share of attention that goes to the image at all differs between models.
    """
    figure = Figure(figsize=(_PANEL * (1 + len(models)), _PANEL * 1.42), dpi=144)
    panels = figure.subplots(1, 1 + len(models), squeeze=False)[0]
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.11, top=0.78, wspace=0.04)
    figure.suptitle(question, fontsize=14, fontweight="bold", y=0.97)
    shown = _enlarge(image)
    panels[0].imshow(shown)
    _label(panels[0], "image, true answer", answer, _QUIET)
    for panel, model in zip(panels[1:], models, strict=True):
        panel.imshow(overlay(shown, model.attention))
        right = model.answer == answer
        _label(panel, model.who, model.answer or "(nothing)", _RIGHT if right else _WRONG)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def overlay(
    image: UInt8[np.ndarray, "height width 3"], attention: Float[np.ndarray, "row column"]
) -> UInt8[np.ndarray, "height width 3"]:
    """The image in pale grey with its attention in colour over it: the more, the more opaque."""
    low, high = float(attention.min()), float(attention.max())
    share = (attention - low) / max(high - low, 1e-12)
    size = (image.shape[1], image.shape[0])
    smooth = Image.fromarray(share.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    heat = np.clip(np.asarray(smooth), 0, 1)[..., None]
    colour = mpl.colormaps["inferno"](heat[..., 0])[..., :3]
    grey = image.mean(axis=-1, keepdims=True) / 255
    pale = 0.7 * grey + 0.3 * image / 255
    opacity = 0.25 + 0.6 * heat
    mixed = pale * (1 - opacity) + colour * opacity
    return np.rint(255 * mixed).astype(np.uint8)


def _enlarge(image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width 3"]:
    """Whole multiples only, pixel by pixel, so that nothing is invented."""
    times = max(1, _SHOWN // max(image.shape[:2]))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def _label(panel: Axes, title: str, answer: str, colour: str) -> None:
    panel.set_title(title, fontsize=11, color="#24292f", pad=5)
    panel.set_xlabel(answer, fontsize=12, fontweight="bold", color=colour, labelpad=5)
    panel.set_xticks([])
    panel.set_yticks([])
    for edge in panel.spines.values():
        edge.set_color("#d0d7de")
