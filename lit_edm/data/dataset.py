"""Data sets of captioned images, trained on or held out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lit_edm.batch import Batch
from lit_edm.data.draws import Draw
from lit_edm.data.items import Item
from lit_edm.data.latents import LatentStore
from lit_edm.data.transforms import RandomViews, View


class TrainingImages(Dataset[Batch]):
    """Makes batches of draws, and of nothing else: no worker, epoch or global generator changes them.

    Args:
        items: What is drawn from.
        views: What may be drawn of a picture.

    Attributes:
        latents: Where batches take moments from in place of pixels; nowhere if None.
    """

    def __init__(self, items: Sequence[Item], views: RandomViews) -> None:
        self.items = items
        self.views = views
        self.latents: LatentStore | None = None
        self.has_masks = any(item.mask for item in items)
        self.has_teacher = any(item.teacher for item in items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, draws: Sequence[Draw]) -> Batch:
        examples = [self._example(draw) for draw in draws]
        columns = {key: [example[key] for example in examples] for key in examples[0]}
        # default_collate stacks tensors where the process that trains can see them, without another copy.
        return {k: default_collate(v) if isinstance(v[0], Tensor) else v for k, v in columns.items()}  # type: ignore[return-value]

    def _example(self, draw: Draw) -> dict[str, Any]:
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
