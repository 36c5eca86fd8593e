"""Makes training images of pictures of any shape: resized, mirrored or not, and cut out; never stretched."""

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from lit_edm.data.buckets import Size
from lit_edm.errors import InputError


class Cut(NamedTuple):
    """Where a training image lies in the resized and, perhaps, mirrored picture, in pixels."""

    resized: Size
    """Height and width of the resized picture."""
    top: int
    """Rows above the training image."""
    left: int
    """Columns to the left of the training image."""


@dataclass(frozen=True)
class View:
    """One way to make a training image of a picture: there is room to choose a cut in along one of its sides.

    Args:
        size: Height and width of the training image in pixels.
        flip: Whether the picture is mirrored, before the cut.
        position: Where the cut is, from 0 at the top or left up to 1, exclusive; in the middle if not given.
    """

    size: Size
    flip: bool = False
    position: float | None = None

    def cut(self, picture: Size) -> Cut:
        """Returns where the training image lies in a picture of this height and width."""
        resized = covering(picture, self.size)
        rooms = [length - side for length, side in zip(resized, self.size, strict=True)]
        places = [room // 2 if self.position is None else int(self.position * (room + 1)) for room in rooms]
        return Cut(resized, *places)

    def __call__(self, pixels: Tensor, mode: str = "bicubic") -> Tensor:
        """Cuts the training image out of a picture, shapes (C, height, width), uint8.

        Args:
            pixels: The picture.
            mode: How interpolate resizes.
        """
        cut, (height, width) = self.cut((pixels.shape[1], pixels.shape[2])), self.size
        # Within one level of Pillow's bicubic, and faster.
        resized = interpolate(pixels[None], cut.resized, mode=mode, antialias=True)[0]
        turned = resized.flip(-1) if self.flip else resized
        return turned[:, cut.top : cut.top + height, cut.left : cut.left + width]


@dataclass(frozen=True)
class RandomViews:
    """Draws a view of a picture.

    Args:
        random_crop: Cut at a random place rather than in the middle.
        random_flip: Mirror one picture in two.
        crops: Number of places there are to cut at, the first in the middle, to half a pixel; any place if not given.
    """

    random_crop: bool = False
    random_flip: bool = False
    crops: int | None = None

    def draw(self, size: Size, generator: torch.Generator | None = None) -> View:
        """Returns a view of a size; follows from the generator, or from torch's own if none is given."""
        flip = self.random_flip and bool(torch.rand((), generator=generator) < 0.5)
        return View(size, flip, self._position(generator) if self.random_crop else None)

    def all(self, size: Size) -> list[View]:
        """Returns every view of a size that can be drawn, where the number of places is given or there is one."""
        positions = [golden(number) for number in range(self.crops or 1)] if self.random_crop else [None]
        flips = [False, True] if self.random_flip else [False]
        return [View(size, flip, position) for position in positions for flip in flips]

    def _position(self, generator: torch.Generator | None) -> float:
        if self.crops is not None:
            return golden(int(torch.randint(self.crops, (), generator=generator)))
        return float(torch.rand((), generator=generator, dtype=torch.float64))


@dataclass(frozen=True)
class SquareCrop:
    """Resizes the short side to the resolution, then cuts out a square.

    Args:
        resolution: Side of the square in pixels.
        random_crop: Cut at a random place, drawn anew at each call, rather than in the middle.
        random_flip: Mirror one call in two, drawn at random, before the cut.
    """

    resolution: int
    random_crop: bool = False
    random_flip: bool = False

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise InputError(f"data.init_args.resolution is {self.resolution}: give at least 1")

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Cuts a square out of a picture.

        Args:
            pixels: The picture, shape (3, H, W), uint8.

        Returns:
            The square in [-1, 1], shape (3, resolution, resolution), float32, and the top and left of the cut in
            pixels of the resized and flipped picture, shape (2,), int64.
        """
        view = RandomViews(self.random_crop, self.random_flip).draw((self.resolution, self.resolution))
        cut = view.cut((pixels.shape[1], pixels.shape[2]))
        return view(pixels) / 127.5 - 1, torch.tensor([cut.top, cut.left])


def covering(picture: Size, size: Size) -> Size:
    """Returns the height and width that a picture is resized to, unstretched, so that it just covers a size."""
    height, width = picture
    if height * size[1] > width * size[0]:  # taller than the size: widths agree
        return max(size[0], round(height * size[1] / width)), size[1]
    return size[0], max(size[1], round(width * size[0] / height))


def golden(number: int) -> float:
    """Returns one of a sequence of numbers in [0, 1) whose first ones, however many, fill it evenly; from 0.5 on."""
    return (0.5 + number * (sqrt(5) - 1) / 2) % 1


def to_tensor(image: Image.Image) -> Tensor:
    """Returns the levels of an image, shape (C, H, W), uint8."""
    levels = torch.from_numpy(np.array(image))
    return levels[None] if levels.ndim == 2 else levels.permute(2, 0, 1)
