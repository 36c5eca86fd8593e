"""What is told of images before training."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lit_edm.batch import ImageSummary, LatentsToKeep
from lit_edm.data.draws import Pool
from lit_edm.data.images import ImageFile, ImageSource
from lit_edm.data.items import Item
from lit_edm.data.latents import LatentStore
from lit_edm.data.rendered import RenderedImage
from lit_edm.data.transforms import RandomViews


def summarize(
    items: Sequence[Item], pools: Sequence[Pool], class_folders: Sequence[Path], held_out: int
) -> ImageSummary:
    """Counts what there is to train on.

    Args:
        items: What an epoch draws from.
        pools: How often it draws each.
        class_folders: Folders of class images, in which no others are.
        held_out: Images to validate on.
    """
    prior = sum(item.teacher or lies_in(item.image, class_folders) for item in items)
    return {
        "images": len(items) - prior,
        "prior": prior,
        "to_render": [(item.image.name, item.size) for item in items if not is_there(item.image)],
        "masks": sum(item.mask is not None for item in items),
        "held_out": held_out,
        "examples": round(sum(pool.draws for pool in pools)),
        "sizes": dict(Counter(item.size for item in items)),
    }


def count_latents(items: Sequence[Item], views: RandomViews, store: LatentStore) -> LatentsToKeep:
    """Counts the views that can be drawn of items and whose moments a store holds and lacks."""
    wanted = {(item.image, view, item.cut(view)): (item, view) for item in items for view in views.all(item.size)}
    missing = Counter(
        view.size
        for item, view in wanted.values()
        if not is_there(item.image) or store.key(item, view) not in store.cache
    )
    folder = getattr(store.cache, "folder", None)
    return {"folder": folder, "kept": len(wanted) - missing.total(), "missing": dict(missing)}


def is_there(image: ImageSource) -> bool:
    """Tells whether a picture can be read now, rather than after the base has rendered it."""
    return not isinstance(image, RenderedImage) or image.path.exists()


def lies_in(image: ImageSource, folders: Sequence[Path]) -> bool:
    """Tells whether a picture is a file in one of some folders."""
    return isinstance(image, ImageFile) and any(image.path.is_relative_to(folder) for folder in folders)
