"""The sizes of training images: one square, or several shapes of about its area."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

from lit_edm.errors import InputError

Size = tuple[int, int]
"""Height and width in pixels."""

LEAST_AREA = 0.9
"""Area of the smallest shape, as a share of the square's."""


@dataclass(frozen=True)
class AspectBuckets:
    """Trains each image in the shape that is nearest to its own, so that little of it is cut off.

    The shapes are all heights and widths that are multiples of the step, with an area of 0.9 to 1 times that of the
    square of the resolution. The defaults and 1024 px give the shapes that SDXL was trained with (Podell et al. 2023,
    appendix I).

    Args:
        step: What heights and widths are multiples of, in pixels; itself a multiple of the VAE's factor, 8 of SDXL's.
        max_aspect: Largest ratio of the long side to the short one; longer images are cropped to it.
    """

    step: int = 64
    max_aspect: float = 4.0

    def __post_init__(self) -> None:
        if self.step < 1:
            raise InputError(f"data.init_args.buckets.step is {self.step}: give at least 1")
        if self.max_aspect < 1:
            raise InputError(f"data.init_args.buckets.max_aspect is {self.max_aspect}: give at least 1")

    def sizes(self, resolution: int) -> list[Size]:
        """Returns the shapes, from wide to tall.

        Raises:
            InputError: The step is too large for there to be any.
        """
        sides = range(self.step, int(resolution * sqrt(self.max_aspect)) + 1, self.step)
        pairs = [(height, width) for height in sides for width in reversed(sides)]
        sizes = [pair for pair in pairs if self._fits(*pair, resolution**2)]
        if not sizes:
            raise InputError(
                f"data.init_args.buckets.step is {self.step}, but no multiples of it make up about the area of "
                f"{resolution} x {resolution} pixels: give a smaller one"
            )
        return sizes

    def _fits(self, height: int, width: int, area: int) -> bool:
        return LEAST_AREA * area <= height * width <= area and max(height, width) <= self.max_aspect * min(
            height, width
        )


def nearest(picture: Size, sizes: Sequence[Size]) -> Size:
    """Returns the size whose ratio of height to width is nearest to that of a picture; the larger of equally near."""
    height, width = picture
    return min(sizes, key=lambda size: (abs(log(size[0] * width / (size[1] * height))), -size[0] * size[1]))
