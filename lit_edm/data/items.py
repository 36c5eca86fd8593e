"""What a training example is made of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edm.data.buckets import Size
from lit_edm.data.captions import CaptionRules
from lit_edm.data.images import ImageSource, read_mask
from lit_edm.data.transforms import Cut, View, to_tensor


@dataclass(frozen=True)
class Item:
    """A picture, what is said of it, and the size of the training image that is made of it.

    Args:
        image: The picture.
        caption: What is said of it, before the rules change it.
        picture: Height and width of the picture in pixels.
        size: Height and width of the training image in pixels.
        mask: A picture of the same height and width that weighs its pixels; all weigh 1 if not given.
        rules: How the caption is changed each time it is shown.
        teacher: Whether the target is what the untouched base predicts rather than the picture.
    """

    image: ImageSource
    caption: str
    picture: Size
    size: Size
    mask: ImageSource | None = None
    rules: CaptionRules = CaptionRules()
    teacher: bool = False

    def cut(self, view: View) -> Cut:
        """Returns where a view of the picture lies, without reading it."""
        return view.cut(self.picture)

    def pixels(self, view: View) -> Tensor:
        """Reads the picture and returns a view of it in [-1, 1], shape (3, H, W), float32."""
        return view(to_tensor(self.image.read())).float().div_(127.5).sub_(1)

    def weights(self, view: View) -> Tensor:
        """Reads the mask and returns the same view of it in [0, 1], shape (1, H, W), float32."""
        if self.mask is None:
            return torch.ones(1, *self.size)
        return view(to_tensor(read_mask(self.mask)), mode="bilinear") / 255
