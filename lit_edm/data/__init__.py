"""Datasets and data modules that yield batches of captioned images."""

from lit_edm.data.datamodule import CaptionedImagesDataModule
from lit_edm.data.folder import CaptionedImage, CaptionedImageFolder
from lit_edm.data.transforms import SquareCrop

__all__ = ["CaptionedImage", "CaptionedImageFolder", "CaptionedImagesDataModule", "SquareCrop"]
