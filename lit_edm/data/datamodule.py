"""Data module of captioned image folders."""

from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lit_edm.batch import Example
from lit_edm.data.folder import CaptionedImageFolder
from lit_edm.data.images import check_images
from lit_edm.data.loading import check_least, make_loader
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
        val_root: Folder of images held out for ValidationLoss, captioned like those of root; none if not given.
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
        val_root: Path | str | None = None,
    ) -> None:
        super().__init__()
        self.root = root
        self.val_root = val_root
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
        check_least(self, repeats=1, batch_size=1, num_workers=0)
        self.dataset = self._build_dataset(self.root, SquareCrop(self.resolution, self.random_crop, self.random_flip))
        check_images(image.path for image in self.dataset.images)
        if self.val_root is not None:
            self._set_up_held_out(Path(self.val_root).expanduser())

    def captions(self) -> list[str]:
        """Returns the caption of every training image, once however often it is repeated; called after setup."""
        return [image.caption for image in self.dataset.images]

    def train_dataloader(self) -> DataLoader[Example]:
        """Returns the shuffled batches of an epoch."""
        return make_loader(_Repeated(self.dataset, self.repeats), self.batch_size, self.num_workers, shuffle=True)

    def val_dataloader(self) -> DataLoader[Example] | list[DataLoader[Example]]:
        """Returns the held-out images, cut out of the middle, in the same order always; an empty list without any."""
        return [] if self.val_root is None else make_loader(self.val_dataset, self.batch_size, self.num_workers)

    def _build_dataset(self, root: Path | str, crop: SquareCrop) -> CaptionedImageFolder:
        return CaptionedImageFolder(root, crop, self.caption_column, self.instance_prompt)

    def _set_up_held_out(self, val_root: Path) -> None:
        if not val_root.is_dir():
            raise InputError(f"{val_root} is no folder: correct data.init_args.val_root")
        self.val_dataset = self._build_dataset(val_root, SquareCrop(self.resolution))
        check_images(image.path for image in self.val_dataset.images)
        trained = {image.path.resolve() for image in self.dataset.images}
        if both := next((image.path for image in self.val_dataset.images if image.path.resolve() in trained), None):
            raise InputError(f"{both} is trained on too: keep data.init_args.val_root outside data.init_args.root")


class _Repeated(Dataset[Example]):
    """A dataset several times over, at no cost in memory."""

    def __init__(self, dataset: CaptionedImageFolder, repeats: int) -> None:
        self.dataset = dataset
        self.repeats = repeats

    def __len__(self) -> int:
        return self.repeats * len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        return self.dataset[index % len(self.dataset)]
