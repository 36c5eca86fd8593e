"""Data module of captioned image folders."""

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lit_edm.batch import Example
from lit_edm.data.folder import CaptionedImageFolder
from lit_edm.data.images import check_images
from lit_edm.data.transforms import SquareCrop
from lit_edm.errors import InputError


class CaptionedImagesDataModule(LightningDataModule):
    """Trains on a folder of captioned images.

    Captions come from a metadata.jsonl in the folder (rows with a file_name and a caption, as the ImageFolder of
    `datasets` has them), else from a text file of each image's name beside it, else from the instance prompt.

    Args:
        root: Folder of images, searched with the folders below it.
        resolution: Side of the square training images in pixels.
        caption_column: Column of metadata.jsonl that holds the captions; found by itself if there is only one.
        instance_prompt: Caption of images without one of their own.
        repeats: Times each image is seen in an epoch.
        random_crop: Cut the square out at a random place, drawn anew each time, rather than in the middle.
        random_flip: Mirror images at random, drawn anew each time; not for pictures with text or a left and right.
        batch_size: Images in a batch, on each device.
        num_workers: Processes that load images; 0 loads them in the training process.
    """

    def __init__(
        self,
        root: Path | str,
        resolution: int = 1024,
        caption_column: str | None = None,
        instance_prompt: str | None = None,
        repeats: int = 1,
        random_crop: bool = False,
        random_flip: bool = False,
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.root = root
        self.resolution = resolution
        self.caption_column = caption_column
        self.instance_prompt = instance_prompt
        self.repeats = repeats
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.batch_size = batch_size
        self.num_workers = num_workers

    def setup(self, stage: str) -> None:
        """Finds the images and their captions, and checks that every image can be read."""
        for key, least in {"repeats": 1, "batch_size": 1, "num_workers": 0}.items():
            if getattr(self, key) < least:
                raise InputError(f"data.init_args.{key} is {getattr(self, key)}: give at least {least}")
        self.dataset = self._build_dataset()
        check_images(image.path for image in self.dataset.images)

    def captions(self) -> list[str]:
        """Returns the caption of every image, once however often it is repeated; to be called after setup."""
        return [image.caption for image in self.dataset.images]

    def train_dataloader(self) -> DataLoader[Example]:
        """Returns the shuffled batches of an epoch."""
        return DataLoader(
            _Repeated(self.dataset, self.repeats),
            self.batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _build_dataset(self) -> CaptionedImageFolder:
        crop = SquareCrop(self.resolution, self.random_crop, self.random_flip)
        return CaptionedImageFolder(self.root, crop, self.caption_column, self.instance_prompt)


class _Repeated(Dataset[Example]):
    """A dataset several times over, at no cost in memory."""

    def __init__(self, dataset: CaptionedImageFolder, repeats: int) -> None:
        self.dataset = dataset
        self.repeats = repeats

    def __len__(self) -> int:
        return self.repeats * len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        return self.dataset[index % len(self.dataset)]
