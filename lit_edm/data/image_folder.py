"""A folder of images whose classes are the folders in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from lit_edm.batch import LabelledExample
from lit_edm.data.images import ImageFile, check_images, find_images
from lit_edm.data.labelled import LabelledImagesDataModule
from lit_edm.data.transforms import SquareCrop
from lit_edm.errors import InputError


@dataclass(frozen=True)
class LabelledImage:
    """An image file and its class."""

    path: Path
    label: int


class ImageFolder(Dataset[LabelledExample]):
    """Labelled images, read, cropped and flipped anew each time they are asked for.

    Args:
        images: The images.
        crop: Makes a square of each.
    """

    def __init__(self, images: Sequence[LabelledImage], crop: SquareCrop) -> None:
        self.images = images
        self.crop = crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> LabelledExample:
        image = self.images[index]
        square, _ = self.crop(torch.from_numpy(np.array(ImageFile(image.path).read())).permute(2, 0, 1))
        return {"image": square, "label": image.label}


class ImageFolderDataModule(LabelledImagesDataModule):
    """Trains on the images of a folder; the folders in it are the classes. Images without classes go into one folder.

    Args:
        root: Folder of the class folders, each searched with the folders below it.
        resolution: Side of the square images in pixels.
        random_crop: Cut training images out at a random place, drawn anew each time, rather than in the middle.
        random_flip: Mirror training images at random, drawn anew each time; not for images with a left and right.
        held_out: Share of the images that is validated on and never trained on, in [0, 1).
        batch_size: Images in a batch, on each device.
        num_workers: Processes that load images; 0 loads them in the training process.
        seed: What the choice of held-out images follows from.
    """

    def __init__(
        self,
        root: Path | str,
        resolution: int = 32,
        random_crop: bool = False,
        random_flip: bool = False,
        held_out: float = 0.1,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(held_out, batch_size, num_workers, seed)
        self.root = root
        self.resolution = resolution
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.image_shape = (3, resolution, resolution)

    def read(self) -> tuple[ImageFolder, ImageFolder]:
        """Finds the images, checks that each can be read, and returns them with and without random changes."""
        images, self.class_names = find_labelled_images(Path(self.root).expanduser())
        check_images(ImageFile(image.path) for image in images)
        trained = ImageFolder(images, SquareCrop(self.resolution, self.random_crop, self.random_flip))
        return trained, ImageFolder(images, SquareCrop(self.resolution))


def find_labelled_images(root: Path) -> tuple[list[LabelledImage], list[str]]:
    """Finds the images in class folders; returns them and the names of the classes, both sorted.

    Raises:
        InputError: The folder holds no images, or one that lies in no class folder.
    """
    paths = find_images(root)
    if loose := next((path for path in paths if path.parent == root), None):
        raise InputError(f"{loose} lies in no class folder: move it to {root / 'some_class' / loose.name}")
    name_of = {path: path.relative_to(root).parts[0] for path in paths}
    names = sorted(set(name_of.values()))
    return [LabelledImage(path, names.index(name)) for path, name in name_of.items()], names
