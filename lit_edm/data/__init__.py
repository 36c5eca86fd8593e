"""Datasets and data modules that yield batches of captioned or of labelled images."""

from lit_edm.data.datamodule import CaptionedImagesDataModule
from lit_edm.data.digits import Digits, DigitsDataModule
from lit_edm.data.folder import CaptionedImage, CaptionedImageFolder
from lit_edm.data.image_folder import ImageFolder, ImageFolderDataModule, LabelledImage
from lit_edm.data.transforms import SquareCrop

__all__ = [
    "CaptionedImage",
    "CaptionedImageFolder",
    "CaptionedImagesDataModule",
    "Digits",
    "DigitsDataModule",
    "ImageFolder",
    "ImageFolderDataModule",
    "LabelledImage",
    "SquareCrop",
]
