"""Datasets and data modules that yield batches of captioned or of labelled images."""

from lit_edm.data.buckets import AspectBuckets
from lit_edm.data.captions import CaptionRules
from lit_edm.data.concepts import Concept
from lit_edm.data.datamodule import CaptionedImagesDataModule
from lit_edm.data.dataset import HeldOutImages, TrainingImages
from lit_edm.data.digits import Digits, DigitsDataModule
from lit_edm.data.draws import Draw, EpochBatches, Pool
from lit_edm.data.folder import CaptionedImage, find_captioned_images
from lit_edm.data.hub import load_captioned_images
from lit_edm.data.image_folder import ImageFolder, ImageFolderDataModule, LabelledImage
from lit_edm.data.images import ImageFile, ImageSource
from lit_edm.data.items import Item
from lit_edm.data.prior import ClassImages, Prior, TeacherPrior
from lit_edm.data.prompts import PromptsDataModule
from lit_edm.data.transforms import SquareCrop

__all__ = [
    "AspectBuckets",
    "CaptionRules",
    "CaptionedImage",
    "CaptionedImagesDataModule",
    "ClassImages",
    "Concept",
    "Digits",
    "DigitsDataModule",
    "Draw",
    "EpochBatches",
    "HeldOutImages",
    "ImageFile",
    "ImageFolder",
    "ImageFolderDataModule",
    "ImageSource",
    "Item",
    "LabelledImage",
    "Pool",
    "Prior",
    "PromptsDataModule",
    "SquareCrop",
    "TeacherPrior",
    "TrainingImages",
    "find_captioned_images",
    "load_captioned_images",
]
