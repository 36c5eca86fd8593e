"""Makes square training images of pictures of any shape."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lit_edm.errors import InputError


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
        pixels = resize_short_side(pixels, self.resolution)
        if self.random_flip and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        top, left = (self._place(length - self.resolution) for length in pixels.shape[1:])
        square = pixels[:, top : top + self.resolution, left : left + self.resolution]
        return square / 127.5 - 1, torch.tensor([top, left])

    def _place(self, room: int) -> int:
        return int(torch.randint(room + 1, ())) if self.random_crop else room // 2


def resize_short_side(pixels: Tensor, length: int) -> Tensor:
    """Resizes a picture of shape (3, H, W), uint8, so that its short side has the given length, unstretched."""
    height, width = pixels.shape[1:]
    size = [round(side * length / min(height, width)) for side in (height, width)]
    # Within one level of Pillow's bicubic, and faster.
    return interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
