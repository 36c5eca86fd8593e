"""The contract between data modules and training modules."""

from collections.abc import Callable, Mapping, Sized
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor


class Batch(TypedDict):
    """Captioned images of one size. What is not required may be left out; so may the image where there are moments."""

    image: Tensor
    """Pixels in [-1, 1], shape (B, 3, H, W), float32."""
    moments: NotRequired[Tensor]
    """What the VAE's encoder says of the pixels, in their place: mean and log-variance, (B, 2C, H / f, W / f)."""
    caption: list[str]
    """One caption an image, placeholders not yet replaced."""
    original_size: Tensor
    """Height and width in pixels before resizing, EXIF rotation applied, shape (B, 2), int64."""
    crop_top_left: Tensor
    """Top and left of the crop in pixels of the resized (and, if drawn, flipped) image, shape (B, 2), int64."""
    weight: NotRequired[Tensor]
    """Weight of each image's loss in the mean over the batch, shape (B,), float32; 1 if left out."""
    mask: NotRequired[Tensor]
    """Weight of each pixel's error, in [0, 1], shape (B, 1, H, W), float32; 1 if left out."""
    teacher: NotRequired[list[bool]]
    """Whether the target is what the untouched base predicts rather than the image; false if left out."""
    images: NotRequired[int]
    """Images that all processes see in this step together, each but for what it repeats with weight 0; B on each if
    left out."""


@runtime_checkable
class DescribesImages(Protocol):
    """What a data module may tell of its images before training, so that a module can find mistakes at once.

    Data modules without these members train all the same; only the checks and the caches of texts are left out.
    """

    captions_vary: bool
    """Whether captions are changed at random, so that `captions` does not list all that training shows."""

    @property
    def needs_teacher(self) -> bool:
        """Whether some examples have a prediction of the untouched base as their target; asked after setup."""
        ...

    def captions(self) -> list[str]:
        """Returns the caption of every training image, placeholders not yet replaced; called after setup."""
        ...

    def sizes(self) -> set[tuple[int, int]]:
        """Returns the heights and widths of training images in pixels; called after setup."""
        ...


class ClassImageRequest(TypedDict):
    """A class image that is to be rendered by the untouched base."""

    prompt: str
    """What it shows."""
    size: tuple[int, int]
    """Height and width in pixels."""
    seed: int
    """What its noise follows from."""


@runtime_checkable
class NeedsPictures(Protocol):
    """A data module that has pictures rendered by the base before training, for prior preservation."""

    def render_missing(self, render: Callable[[list[ClassImageRequest]], Tensor]) -> None:
        """Has what is missing rendered and keeps it; called after setup on every process, before the first batch.

        Args:
            render: Returns pixels (B, 3, H, W) in [-1, 1] of requests of one size.
        """
        ...


@runtime_checkable
class CachesLatents(Protocol):
    """A data module that keeps what the VAE makes of its images, so that training needs no pixels."""

    def fill_cache(self, encode: Callable[[Tensor], Tensor], settings: str) -> bool:
        """Has what is missing encoded and keeps it; called after setup on every process, before the first batch.

        Args:
            encode: Maps pixels (B, 3, H, W) in [-1, 1] to the encoder's moments (B, 2C, H / f, W / f), float32.
            settings: Names the encoder, weights included: others' moments are never taken for its own.

        Returns:
            Whether all batches of training hold moments from now on.
        """
        ...


class ImageSummary(TypedDict):
    """What the summary of a run says of its images; numbers are those of different ones, whatever their repeats."""

    images: int
    """Images that something is learned from."""
    prior: int
    """Examples that keep what the base knows, those that are not rendered yet included."""
    to_render: list[tuple[str, tuple[int, int]]]
    """File, and height and width in pixels, of each class image that the base is to render."""
    masks: int
    """Images that have a mask."""
    held_out: int
    """Images to validate on."""
    examples: int
    """Examples in an epoch, on all processes, in the mean over epochs."""
    sizes: dict[tuple[int, int], int]
    """How many images and examples of a prior are trained on in each height and width in pixels."""


class LatentsToKeep(TypedDict):
    """What a cache of latents holds and lacks before training."""

    folder: str | None
    """Where they are kept; None in memory."""
    kept: int
    """Views of images whose moments are kept."""
    missing: dict[tuple[int, int], int]
    """How many views lack theirs in each height and width in pixels."""


@runtime_checkable
class SummarizesImages(Protocol):
    """A data module that the summary of a run can ask; others train all the same."""

    def summary(self) -> ImageSummary:
        """Returns what there is to train on; called after setup."""
        ...

    def latents_to_keep(self, settings: str) -> LatentsToKeep | None:
        """Returns what CachesLatents.fill_cache would find with the same settings; None if there is no cache."""
        ...


class PictureRequest(TypedDict):
    """A picture that is to be rendered; it follows from what stands here and from the module's settings alone."""

    index: int
    """Its place among all."""
    prompt: str
    """What it shows, placeholders not yet replaced."""
    size: tuple[int, int]
    """Height and width in pixels."""
    seed: int
    """What all of its noise follows from."""
    scale: float
    """Factor on the updates of adapters from files, beside that of each file."""


@runtime_checkable
class RequestsPictures(Protocol):
    """A data module whose batches are lists of requests, each list of one size and one scale."""

    def requests(self) -> list[PictureRequest]:
        """Returns all requests, in order; called after setup."""
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
    weight: NotRequired[Tensor]
    """Weight of each image's loss in the mean over the batch, shape (B,), float32; 1 if left out."""
    images: NotRequired[int]
    """As in Batch."""


@runtime_checkable
class DescribesLabelledImages(Protocol):
    """What a data module may tell of labelled images after setup: modules check it, callbacks write the names."""

    image_shape: tuple[int, int, int]
    """Channels, height and width of every image."""
    class_names: list[str]
    """A name for each class."""


def images_in(batch: Any, processes: int) -> int | None:
    """Returns the images that all processes see together with this batch of one of them; None if it cannot tell.

    Args:
        batch: A Batch, a LabelledBatch, or another mapping whose first value has an entry an image.
        processes: How many processes train together.
    """
    if not isinstance(batch, Mapping):
        return None
    rows = next(iter(batch.values()), None)
    return batch.get("images") or (len(rows) * processes if isinstance(rows, Sized) else None)
