"""Data module of captioned images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lit_edm.batch import Batch, ClassImageRequest, ImageSummary, LatentsToKeep
from lit_edm.cache import TensorCache
from lit_edm.data.buckets import AspectBuckets, Size
from lit_edm.data.captions import CaptionRules
from lit_edm.data.concepts import Concept, make_items, one_or_several, plan_epoch
from lit_edm.data.dataset import HeldOutImages, TrainingImages
from lit_edm.data.images import ImageFile
from lit_edm.data.items import Item
from lit_edm.data.latents import Digests, LatentStore
from lit_edm.data.loading import check_least, make_loader, make_training_loader
from lit_edm.data.prior import Prior
from lit_edm.data.rendered import render_missing
from lit_edm.data.summary import count_latents, summarize
from lit_edm.data.team import Team
from lit_edm.data.transforms import RandomViews
from lit_edm.errors import InputError


class CaptionedImagesDataModule(LightningDataModule):
    """Trains on captioned images: a folder of them, a data set of the `datasets` library, or several concepts of these.

    Captions of a folder come from its metadata.jsonl, .csv or .parquet (rows with a file_name and a caption, as the
    ImageFolder of `datasets` has them), else from a text file of each image's name beside it (.txt or .caption), else
    from the instance prompt. An epoch shows every image, and each time it draws anew what is random. Batches follow
    from the run's seed and the epoch alone, whatever the number of workers; processes share what one would train on.

    Args:
        root: Folder of images, searched with the folders below it.
        dataset: Hub name or path of a data set of the `datasets` library, in place of a folder.
        dataset_config: Which of the data set's configurations.
        split: Which of the data set's splits.
        image_column: Column of the images' names in metadata, file_name if not given; or of the images in a data set,
            image if not given.
        caption_column: Column of the captions; found by itself if there is only one.
        mask_column: Column of the masks, which weigh the pixels of their images: white counts, black does not.
        instance_prompt: Caption of images without one of their own.
        repeats: Times each image is seen in an epoch.
        prior: What keeps the class of the images as the base knows it: class images or the base as a teacher, of which
            an epoch shows as many as of the images, and so does a batch where their shapes agree; nothing if not given.
        concepts: Several kinds of images, each with all of the settings above, in place of these.
        caption_prefix: Words before every caption, with a space between; not before those of class images.
        caption_dropout: Share of captions, in [0, 1), that are left out, so that the model also learns to do without,
            as classifier-free guidance asks of it.
        shuffle_tags: Shuffle the parts of captions that commas separate, anew each time.
        keep_tags: Parts at the beginning of captions that stay where they are when the others are shuffled.
        resolution: Side of the square training images in pixels.
        buckets: Trains images in shapes near their own, of about the square's area, rather than as squares. A batch has
            images of one shape, so that rare shapes make small batches, in which each image counts for more.
        random_crop: Cut the training image out at a random place, drawn anew each time, rather than in the middle.
        random_flip: Mirror images at random, drawn anew each time; not for pictures with text or a left and right.
        batch_size: Images in a batch, on each device.
        num_workers: Processes that load images; 0 loads them in the training process.
        broken_images: Whether a run stops at an image that can no longer be read, its mask and cached latents included,
            or skips it: others of its size and kind stand in for it then, with its weight. One that cannot be read at
            the start always stops the run, and so does one of val_root: a mean over fewer would mean something else.
        latent_cache: Where the VAE's view of each image is kept, so that training reads and encodes none; nowhere if
            not given.
        cache_crops: Places to cut each image at, if there is a latent_cache and random_crop: as many are kept of it.
        val_root: Folder of images held out for ValidationLoss, captioned like those of root or of the first concept,
            and cut to squares; none if not given.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        split: str = "train",
        image_column: str | None = None,
        caption_column: str | None = None,
        mask_column: str | None = None,
        instance_prompt: str | None = None,
        repeats: int = 1,
        prior: Prior | None = None,
        concepts: list[Concept] | None = None,
        caption_prefix: str = "",
        caption_dropout: float = 0.0,
        shuffle_tags: bool = False,
        keep_tags: int = 0,
        resolution: int = 1024,
        buckets: AspectBuckets | None = None,
        random_crop: bool = False,
        random_flip: bool = False,
        batch_size: int = 1,
        num_workers: int = 0,
        broken_images: Literal["stop", "skip"] = "stop",
        latent_cache: TensorCache | None = None,
        cache_crops: int = 4,
        val_root: Path | str | None = None,
    ) -> None:
        super().__init__()
        self.concept = Concept(
            root,
            dataset,
            dataset_config,
            split,
            image_column,
            caption_column,
            mask_column,
            instance_prompt,
            repeats,
            prior,
        )
        self.concepts = concepts
        self.rules = CaptionRules(caption_prefix, caption_dropout, shuffle_tags, keep_tags)
        self.captions_vary = self.rules.varies
        self.resolution = resolution
        self.buckets = buckets
        self.views = RandomViews(random_crop, random_flip, None if latent_cache is None else cache_crops)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.broken_images = broken_images
        self.latent_cache = latent_cache
        self.cache_crops = cache_crops
        self.val_root = val_root

    def setup(self, stage: str) -> None:
        """Finds the images and their captions, and checks that every image can be read."""
        check_least(self, resolution=1, batch_size=1, num_workers=0, cache_crops=1)
        square = (self.resolution, self.resolution)
        sizes = [square] if self.buckets is None else self.buckets.sizes(self.resolution)
        concepts = one_or_several(self.concept, self.concepts)
        epoch = plan_epoch(concepts, sizes, self.rules)
        self.digests = Digests()
        kinds = [pool.items for pool in epoch.pools] if self.broken_images == "skip" else []
        self.train_set, self.pools = TrainingImages(epoch.items, self.views, kinds), epoch.pools
        if self.buckets is not None and self._team().rank == 0:
            epoch.warn_of_small_batches(self.batch_size)
        if self.val_root is not None:
            self.val_set = HeldOutImages(self._find_held_out(Path(self.val_root).expanduser(), concepts[0], square))

    def summary(self) -> ImageSummary:
        """Returns what there is to train on; called after setup."""
        priors = [concept.prior for concept in self.concepts or [self.concept] if concept.prior is not None]
        folders = [prior.folder for prior in priors if prior.folder is not None]
        return summarize(self.train_set.items, self.pools, folders, len(self.val_set) if self.val_root else 0)

    @property
    def needs_teacher(self) -> bool:
        """Whether some examples have a prediction of the untouched base as their target; asked after setup."""
        return self.train_set.has_teacher

    def captions(self) -> list[str]:
        """Returns every caption that training can show, once; called after setup."""
        listed = (item.rules.listed(item.caption) for item in self.train_set.items)
        return list(dict.fromkeys(caption for captions in listed for caption in captions))

    def sizes(self) -> set[Size]:
        """Returns the heights and widths of training images in pixels; called after setup."""
        return {item.size for item in self.train_set.items}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns the batches of an epoch, shuffled, of one size each.

        Raises:
            InputError: The trainer would have single examples in their place.
        """
        in_memory = self.latent_cache is not None and not self.latent_cache.is_shared
        return make_training_loader(self.train_set, self.pools, self, in_memory)

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[DataLoader[dict[str, Any]]]:
        """Returns the held-out images, cut out of the middle, in the same order always; an empty list without any."""
        return [] if self.val_root is None else make_loader(self.val_set, self.batch_size, self.num_workers)

    def render_missing(self, render: Callable[[list[ClassImageRequest]], Tensor]) -> None:
        """Has class images rendered that are asked for and not there; all processes share the work.

        Args:
            render: Returns pixels (B, 3, H, W) in [-1, 1] of requests of one size.

        Raises:
            InputError: What another process rendered cannot be seen.
        """
        render_missing(self.train_set.items, render, self._team())

    def fill_cache(self, encode: Callable[[Tensor], Tensor], settings: str) -> bool:
        """Has views encoded that are not kept yet; processes share the work if they see what the others keep.

        Args:
            encode: Maps pixels (B, 3, H, W) in [-1, 1] to the encoder's moments (B, 2C, H / f, W / f), float32.
            settings: Names the encoder, weights included.

        Returns:
            Whether there is a cache, so that all batches of training hold moments from now on.
        """
        if self.latent_cache is None:
            return False
        store = LatentStore(self.latent_cache, settings, self.digests)
        store.fill(self.train_set.items, self.views, encode, self._team())
        self.train_set.latents = store
        return True

    def latents_to_keep(self, settings: str) -> LatentsToKeep | None:
        """Returns what fill_cache would find with the same settings; None if there is no cache."""
        if self.latent_cache is None:
            return None
        store = LatentStore(self.latent_cache, settings, self.digests)
        return count_latents(self.train_set.items, self.views, store)

    def _find_held_out(self, val_root: Path, like: Concept, square: Size) -> list[Item]:
        if not val_root.is_dir():
            raise InputError(f"{val_root} is no folder: correct data.init_args.val_root")
        if like.root is None:  # the columns of a data set are not those of a folder
            like = Concept(instance_prompt=like.instance_prompt)
        found = replace(like, root=val_root, mask_column=None).find()
        trained = {item.image.path.resolve() for item in self.train_set.items if isinstance(item.image, ImageFile)}
        paths = [image.image.path for image in found if isinstance(image.image, ImageFile)]
        if both := next((path for path in paths if path.resolve() in trained), None):
            raise InputError(f"{both} is trained on too: keep data.init_args.val_root outside data.init_args.root")
        return make_items(found, [square], CaptionRules(self.rules.prefix))

    def _team(self) -> Team:
        if self.trainer is None:
            return Team()
        return Team(self.trainer.global_rank, self.trainer.world_size, self.trainer.strategy.barrier)
