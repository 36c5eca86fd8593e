"""Styles that the base learns beside flat and line: flat icons, coloured, lit or blurred by a rule.

A base that knew two styles would have no idea of what a style is, and could not be taught a third by a few pictures.
None of these is 3d, which no caption speaks of before fine-tuning.
"""

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageFilter
from tiny_base_icons import Icons

Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From colours (H, W, 3) in [0, 255] and places (H, W, 2) in [-1, 1], right and down, to colours, cut off later."""


def tint(red: int, green: int, blue: int, share: float) -> Rule:
    """Returns a rule that mixes a colour into all others."""
    return lambda colours, _: (1 - share) * colours + share * np.array([red, green, blue])


def grey(colours: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Leaves the lightness alone."""
    return np.repeat(colours @ np.array([[0.299], [0.587], [0.114]]), 3, axis=2)


def shaded(colours: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Is light at the upper left, and dark at the lower right."""
    return colours * (0.9 - 0.3 * places.sum(axis=2, keepdims=True))


def lit(colours: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Has a white light on the upper middle."""
    away = ((places - np.array([-0.1, -0.4])) ** 2).sum(axis=2, keepdims=True)
    return colours + 140 * np.exp(-5 * away)


RULES: Mapping[str, Rule] = {
    "pastel": tint(255, 255, 255, 0.5),
    "dark": tint(0, 0, 0, 0.45),
    "warm": tint(255, 140, 40, 0.35),
    "cold": tint(80, 90, 255, 0.35),
    "grey": grey,
    "shaded": shaded,
    "lit": lit,
}
SOFT = "soft"
STYLES = ("flat", "line", *RULES, SOFT)
"""All that the base learns."""


def styled(icons: Icons, name: str, style: str, side: int) -> Image.Image:
    """Returns a thing in one of STYLES, or under two rules at once ("dark and soft"), RGBA, so many pixels a side."""
    if style == "flat" or style == "line":
        return icons.draw(name, style, side)
    picture = icons.draw(name, "flat", side)
    for part in style.split(" and "):
        picture = blurred(picture) if part == SOFT else ruled(picture, RULES[part])
    return picture


def ruled(picture: Image.Image, rule: Rule) -> Image.Image:
    """Returns a picture, RGBA, whose colours follow a rule."""
    pixels = np.asarray(picture).astype(np.float64)
    line = np.linspace(-1, 1, picture.width)
    colours = rule(pixels[..., :3], np.stack(np.meshgrid(line, line), axis=2)).clip(0, 255)
    return Image.fromarray(np.concatenate([colours, pixels[..., 3:]], axis=2).round().astype(np.uint8))


def blurred(picture: Image.Image) -> Image.Image:
    """Returns a picture, RGBA, without fine detail; what is transparent lends no colour."""
    return picture.convert("RGBa").filter(ImageFilter.GaussianBlur(picture.width / 32)).convert("RGBA")
