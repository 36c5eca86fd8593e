"""A folder of images and their captions as a dataset."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from lit_edm.batch import Example
from lit_edm.data.captions import METADATA, read_metadata, read_sidecar
from lit_edm.data.images import find_images, read_image
from lit_edm.data.transforms import SquareCrop
from lit_edm.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionedImage:
    """An image file and its caption."""

    path: Path
    caption: str


class CaptionedImageFolder(Dataset[Example]):
    """The images of a folder, read, cropped and flipped anew each time they are asked for.

    Args:
        root: Folder of images, searched with the folders below it.
        crop: Makes a training image of each.
        caption_column: Column of metadata.jsonl that holds the captions; found by itself if there is only one.
        instance_prompt: Caption of images without one of their own.
    """

    def __init__(
        self,
        root: Path | str,
        crop: SquareCrop,
        caption_column: str | None = None,
        instance_prompt: str | None = None,
    ) -> None:
        self.images = find_captioned_images(Path(root).expanduser(), caption_column, instance_prompt)
        self.crop = crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        image = self.images[index]
        pixels = torch.from_numpy(np.array(read_image(image.path))).permute(2, 0, 1)
        square, top_left = self.crop(pixels)
        return {
            "image": square,
            "caption": image.caption,
            "original_size": torch.tensor(pixels.shape[1:]),
            "crop_top_left": top_left,
        }


def find_captioned_images(
    root: Path, caption_column: str | None = None, instance_prompt: str | None = None
) -> list[CaptionedImage]:
    """Finds the images of a folder and their captions.

    Where the folder has a metadata.jsonl, its rows name the images and their captions. Elsewhere the caption of an
    image is the text file of the same name, or else the instance prompt.

    Args:
        root: Folder of images, searched with the folders below it.
        caption_column: Column of metadata.jsonl that holds the captions; found by itself if there is only one.
        instance_prompt: Caption of images without one of their own.

    Returns:
        The captioned images, sorted by path.
    """
    images = find_images(root)
    if (root / METADATA).is_file():
        captions = read_metadata(root, images, caption_column)
        _warn_of_images_left_out([image for image in images if image not in captions])
        return [CaptionedImage(image, captions[image]) for image in images if image in captions]
    if caption_column is not None:
        raise InputError(f"{root} has no {METADATA} to read data.init_args.caption_column ({caption_column!r}) from")
    return [CaptionedImage(image, _caption(image, instance_prompt)) for image in images]


def _caption(image: Path, instance_prompt: str | None) -> str:
    caption = read_sidecar(image) or instance_prompt
    if caption is None:
        wanted = f"{image.stem}.txt beside it, a row in {METADATA} or data.init_args.instance_prompt"
        raise InputError(f"{image} has no caption: give it {wanted}")
    return caption


def _warn_of_images_left_out(images: list[Path]) -> None:
    if images:
        logger.warning("%d image(s) without a row in %s left out, the first: %s", len(images), METADATA, images[0])
