"""What is learned from which images, and what an epoch is made of."""

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import permutations
from math import ceil
from pathlib import Path

from lit_edm.data.buckets import Size, nearest
from lit_edm.data.captions import CaptionRules
from lit_edm.data.draws import Pool, pools_by_size
from lit_edm.data.folder import CaptionedImage, find_captioned_images
from lit_edm.data.hub import load_captioned_images
from lit_edm.data.images import is_hidden
from lit_edm.data.items import Item
from lit_edm.data.prior import Prior
from lit_edm.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Concept:
    """Captioned images that something is learned from.

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
        prior: What keeps the class of the concept as the base knows it; nothing if not given.
    """

    root: Path | str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    image_column: str | None = None
    caption_column: str | None = None
    mask_column: str | None = None
    instance_prompt: str | None = None
    repeats: int = 1
    prior: Prior | None = None

    def check(self, where: str) -> None:
        """Raises InputError if settings do not fit together; `where` is the key that they stand under."""
        if (self.root is None) == (self.dataset is None):
            said = "both root and dataset are" if self.root is not None else "neither root nor dataset is"
            raise InputError(f"{where}: {said} given: name a folder as root, or a data set as dataset")
        if self.repeats < 1:
            raise InputError(f"{where}.repeats is {self.repeats}: give at least 1")
        if self.prior is not None:
            self.prior.check(f"{where}.prior.init_args")

    def find(self) -> list[CaptionedImage]:
        """Returns the images."""
        columns = (self.caption_column, self.image_column, self.mask_column, self.instance_prompt)
        if self.root is not None:
            return find_captioned_images(self.root, *columns)
        return load_captioned_images(str(self.dataset), self.dataset_config, self.split, *columns)


def one_or_several(one: Concept, several: Sequence[Concept] | None) -> Sequence[Concept]:
    """Returns what is learned, after a check of its settings: one concept, or several in its place."""
    if several is None:
        one.check("data.init_args")
        return [one]
    given = (field.name for field in fields(Concept) if getattr(one, field.name) != field.default)
    if (setting := next(given, None)) is not None:
        raise InputError(f"data.init_args.{setting} is given beside data.init_args.concepts: move it into these")
    if not several:
        raise InputError("data.init_args.concepts is empty: list some, or give data.init_args.root")
    for number, concept in enumerate(several):
        concept.check(f"data.init_args.concepts[{number}]")
    return several


def check_apart(concepts: Sequence[Concept]) -> None:
    """Raises InputError if images of one folder would be taken for those of another that it lies in.

    Concepts may have a folder in common, to learn it under two captions, and so may their classes.
    """
    roots = {Path(concept.root).expanduser().resolve() for concept in concepts if concept.root is not None}
    priors = [concept.prior for concept in concepts if concept.prior is not None]
    classes = {prior.folder.resolve() for prior in priors if prior.folder is not None}
    if both := sorted(roots & classes):
        raise InputError(f"{both[0]} is the root both of a concept and of a prior: give the prior another folder")
    for inner, outer in permutations(sorted(roots | classes), 2):
        if inner.is_relative_to(outer) and not is_hidden(inner, outer):
            raise InputError(
                f"{inner} lies in {outer}, whose images would include its own: move it, for the roots of concepts and "
                "of priors have to lie apart"
            )


@dataclass(frozen=True)
class Epoch:
    """All that an epoch shows.

    Args:
        items: What is drawn from.
        pools: How often each is drawn, and its weight.
    """

    items: list[Item]
    pools: list[Pool]

    def add(self, items: Sequence[Item], draws: int, weight: float) -> None:
        """Adds items, of which an epoch is to have so many draws."""
        numbers = range(len(self.items), len(self.items) + len(items))
        self.items.extend(items)
        self.pools.extend(pools_by_size(numbers, [item.size for item in items], draws, weight))

    def warn_of_small_batches(self, batch_size: int) -> None:
        """Warns if there are sizes of which an epoch shows less than a batch."""
        draws = Counter[Size]()
        for pool in self.pools:
            draws[pool.size] += ceil(pool.draws)
        if small := [size for size, count in draws.items() if count < batch_size]:
            height, width = rarest = min(small, key=lambda size: draws[size])
            shapes = f"{len(small)} of {len(draws)} shapes make no full batch of {batch_size} images in an epoch"
            least = f"the least {draws[rarest]} of {height} x {width} px"
            remedy = "raise data.init_args.buckets.step or lower data.init_args.batch_size"
            logger.warning("%s, %s: their images count for more; %s", shapes, least, remedy)


def plan_epoch(concepts: Sequence[Concept], sizes: Sequence[Size], rules: CaptionRules) -> Epoch:
    """Finds the images of concepts and of their classes, and checks that each can be read.

    Args:
        concepts: What is learned.
        sizes: Sizes that training images may have.
        rules: How captions of concepts are changed; those of classes are not.
    """
    check_apart(concepts)
    epoch, square = Epoch([], []), nearest((1, 1), sizes)
    for concept in concepts:
        instances = concept.find()
        draws = concept.repeats * len(instances)
        epoch.add(make_items(instances, sizes, rules), draws, weight=1.0)
        if (prior := concept.prior) is not None:
            examples = make_items(prior.examples(instances, square), sizes, CaptionRules(), prior.teacher)
            epoch.add(examples, draws, prior.weight)
    return epoch


def make_items(
    images: Sequence[CaptionedImage], sizes: Sequence[Size], rules: CaptionRules, teacher: bool = False
) -> list[Item]:
    """Checks that images can be read and finds the size that is nearest to the shape of each."""

    def make(image: CaptionedImage) -> Item:
        image.check()
        picture = image.image.size()
        return Item(image.image, image.caption, picture, nearest(picture, sizes), image.mask, rules, teacher)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(make, images))
