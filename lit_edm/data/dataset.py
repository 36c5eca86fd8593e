"""Data sets of captioned images, trained on or held out."""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lit_edm.batch import Batch
from lit_edm.data.draws import Draw
from lit_edm.data.items import Item
from lit_edm.data.latents import LatentStore
from lit_edm.data.transforms import RandomViews, View
from lit_edm.errors import InputError
from lit_edm.seeds import seed_of

logger = logging.getLogger(__name__)


class TrainingImages(Dataset[Batch]):
    """Makes batches of draws, and of nothing else: no worker, epoch or global generator changes them.

    Args:
        items: What is drawn from.
        views: What may be drawn of a picture.
        kinds: Numbers of items that may stand in for each other, for as long as what one is made of cannot be read. A
            warning tells of it once, and who stands in follows from the draw. None may if not given.

    Attributes:
        latents: Where batches take moments from in place of pixels; nowhere if None.
    """

    def __init__(self, items: Sequence[Item], views: RandomViews, kinds: Sequence[Sequence[int]] = ()) -> None:
        self.items = items
        self.views = views
        self.kind_of = {item: kind for kind in kinds for item in kind}
        self._told: set[str] = set()
        self.latents: LatentStore | None = None
        self.has_masks = any(item.mask for item in items)
        self.has_teacher = any(item.teacher for item in items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, draws: Sequence[Draw]) -> Batch:
        examples = [self._example(draw) for draw in draws]
        columns = {key: [example[key] for example in examples] for key in examples[0]}
        # default_collate stacks tensors where the process that trains can see them, without another copy.
        batch = {k: default_collate(v) if isinstance(v[0], Tensor) else v for k, v in columns.items()}
        return {**batch, "images": draws[0].among}  # type: ignore[return-value]

    def _example(self, draw: Draw) -> dict[str, Any]:
        if draw.item not in self.kind_of:
            return self._made(draw)
        for item in chain([draw.item], self._stand_ins(draw)):
            try:
                return self._made(draw._replace(item=item))
            except InputError as error:
                self._tell(str(error))
        raise InputError(
            f"{self.items[draw.item].image.name} cannot be read, nor can any image of its size and kind that could "
            "stand in for it: see that their files are there, and go on from the last checkpoint"
        )

    def _stand_ins(self, draw: Draw) -> Iterator[int]:
        """Yields those that may take the place of a draw's item, in an order that follows from the draw."""
        masked, others = self.items[draw.item].mask is not None, (i for i in self.kind_of[draw.item] if i != draw.item)
        kin = [item for item in others if (self.items[item].mask is not None) == masked]
        generator = torch.Generator().manual_seed(seed_of(draw.seed, draw.item))
        yield from (kin[place] for place in torch.randperm(len(kin), generator=generator).tolist())

    def _tell(self, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            logger.warning("%s; until then others of its size and kind stand in for it", why)

    def _made(self, draw: Draw) -> dict[str, Any]:
        item, generator = self.items[draw.item], torch.Generator().manual_seed(draw.seed)
        caption = item.rules(item.caption, generator)
        view = self.views.draw(item.size, generator)
        example = {"caption": caption, **sizes(item, view), "weight": torch.tensor(draw.weight)}
        if self.latents is None:
            example["image"] = item.pixels(view)
        else:
            example["moments"] = self.latents.get(item, view)
        if self.has_masks:
            example["mask"] = item.weights(view)
        if self.has_teacher:
            example["teacher"] = item.teacher
        return example


class HeldOutImages(Dataset[dict[str, Any]]):
    """Makes examples of images, cut out of the middle, the same each time.

    Args:
        items: The images.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        view, nothing_random = View(item.size), torch.Generator()
        caption = item.rules(item.caption, nothing_random)
        return {"image": item.pixels(view), "caption": caption, **sizes(item, view)}


def sizes(item: Item, view: View) -> dict[str, Tensor]:
    """Returns what a batch says of the sizes of a view."""
    cut = item.cut(view)
    return {"original_size": torch.tensor(item.picture), "crop_top_left": torch.tensor([cut.top, cut.left])}
