"""The contract between data modules and training modules."""

from typing import Protocol, TypedDict, runtime_checkable

from torch import Tensor


class Example(TypedDict):
    """One captioned image, as a dataset yields it."""

    image: Tensor
    """Pixels in [-1, 1], shape (3, H, W), float32."""
    caption: str
    """The caption, placeholders not yet replaced."""
    original_size: Tensor
    """Height and width in pixels before resizing, EXIF rotation applied, shape (2,), int64."""
    crop_top_left: Tensor
    """Top and left of the crop in pixels of the resized (and, if drawn, flipped) image, shape (2,), int64."""


class Batch(TypedDict):
    """A batch of examples, stacked by the default collate function."""

    image: Tensor
    """Pixels in [-1, 1], shape (B, 3, H, W), float32."""
    caption: list[str]
    """One caption an image, placeholders not yet replaced."""
    original_size: Tensor
    """Height and width in pixels before resizing, shape (B, 2), int64."""
    crop_top_left: Tensor
    """Top and left of the crop in pixels of the resized image, shape (B, 2), int64."""


@runtime_checkable
class DescribesImages(Protocol):
    """What a data module may tell of its images before training, so that a module can find mistakes at once.

    Data modules without these members train all the same; only the checks are left out.
    """

    resolution: int
    """Side of the square training images in pixels."""

    def captions(self) -> list[str]:
        """Returns the caption of every training image, placeholders not yet replaced; called after setup."""
        ...


class LabelledExample(TypedDict):
    """One image and its class, as a dataset yields it."""

    image: Tensor
    """Pixels in [-1, 1], shape (C, H, W), float32."""
    label: int
    """The class, from 0 on."""


class LabelledBatch(TypedDict):
    """A batch of labelled examples, stacked by the default collate function."""

    image: Tensor
    """Pixels in [-1, 1], shape (B, C, H, W), float32."""
    label: Tensor
    """The class of each image, shape (B,), int64."""


@runtime_checkable
class DescribesLabelledImages(Protocol):
    """What a data module may tell of labelled images after setup: modules check it, callbacks write the names."""

    image_shape: tuple[int, int, int]
    """Channels, height and width of every image."""
    class_names: list[str]
    """A name for each class."""
