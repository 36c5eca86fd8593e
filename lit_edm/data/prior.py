# ruff: noqa: D102 (overrides are described by their base class)
"""Prior preservation: what keeps a class as the base knows it while one of its kind is learned."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from lit_edm.batch import ClassImageRequest
from lit_edm.data.buckets import Size
from lit_edm.data.folder import CaptionedImage, find_captioned_images
from lit_edm.data.images import SUFFIXES, ImageFile
from lit_edm.data.items import Item
from lit_edm.data.team import Team
from lit_edm.errors import InputError
from lit_edm.files import write_whole
from lit_edm.seeds import run_seed, seed_of

RENDERED_AT_ONCE = 4
"""Class images in a batch."""


class Prior(ABC):
    """Examples of a class, of which an epoch shows as many as of the concept that belongs to it.

    Attributes:
        weight: Weight of their loss, next to 1 for the concept's own images.
        teacher: Whether their target is what the untouched base predicts rather than the images.
    """

    weight: float
    teacher: ClassVar[bool] = False

    @abstractmethod
    def examples(self, instances: Sequence[CaptionedImage], size: Size) -> list[CaptionedImage]:
        """Returns the examples.

        Args:
            instances: The concept's own images.
            size: Height and width that images would have to be rendered at.
        """


@dataclass(frozen=True)
class ClassImages(Prior):
    """Images of the class in a folder, some of them rendered by the base before training, if so many are asked for.

    Args:
        root: Folder of the images; their captions are found as those of a concept's images are.
        prompt: Caption of images without one of their own, and what is rendered.
        weight: Weight of their loss, next to 1 for the concept's own images.
        num_images: Images there are to be at least. What lacks is rendered and kept in the folder.
    """

    root: str
    prompt: str
    weight: float = 1.0
    num_images: int = 0

    def examples(self, instances: Sequence[CaptionedImage], size: Size) -> list[CaptionedImage]:
        folder = Path(self.root).expanduser()
        found = find_captioned_images(folder, instance_prompt=self.prompt) if holds_images(folder) else []
        known = {image.image for image in found}
        rendered = [ImageFile(path) for path in sorted(folder.glob("class_*.png"))]  # metadata do not list these
        found += [CaptionedImage(image, self.prompt) for image in rendered if image not in known]
        if not found and not self.num_images:
            raise InputError(
                f"{folder} holds no class images: correct root of the prior, put some there, or let the base render "
                "them by giving the prior num_images"
            )
        return found + self._to_render(folder, size, self.num_images - len(found))

    def _to_render(self, folder: Path, size: Size, count: int) -> list[CaptionedImage]:
        numbers = (number for number in range(self.num_images) if not (folder / f"class_{number:05}.png").exists())
        wanted = [number for _, number in zip(range(count), numbers, strict=False)]
        images = [RenderedImage(folder / f"class_{number:05}.png", size, number) for number in wanted]
        return [CaptionedImage(image, self.prompt) for image in images]


@dataclass(frozen=True)
class TeacherPrior(Prior):
    """The concept's own images once more, under the class's name, with the untouched base's prediction as the target.

    No images of the class are needed.

    Args:
        prompt: Names the class.
        weight: Weight of their loss, next to 1 for the images under their own captions.
    """

    prompt: str
    weight: float = 1.0
    teacher: ClassVar[bool] = True

    def examples(self, instances: Sequence[CaptionedImage], size: Size) -> list[CaptionedImage]:
        return [CaptionedImage(instance.image, self.prompt) for instance in instances]


@dataclass(frozen=True)
class RenderedImage(ImageFile):
    """An image file that the base writes before training, unless it is there.

    Args:
        rendered: Height and width in pixels.
        number: What its noise follows from, together with the run's seed.
    """

    rendered: Size
    number: int

    def size(self) -> Size:
        return self.rendered

    def check(self) -> None:
        """Accepts what is not there yet."""

    def request(self, prompt: str) -> ClassImageRequest:
        """Returns what the base is asked to render."""
        return {"prompt": prompt, "size": self.rendered, "seed": seed_of(run_seed(), self.number)}

    def write(self, pixels: Tensor) -> None:
        """Writes what was rendered: pixels (3, H, W), about [-1, 1]."""
        levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        image = Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
        write_whole(self.path, lambda part: image.save(part, format="PNG"))


def render_missing(items: Sequence[Item], render: Callable[[list[ClassImageRequest]], Tensor], team: Team) -> None:
    """Has the images rendered that are asked for and not there.

    Args:
        items: Some of which are images to render, all of one size.
        render: Returns pixels (B, 3, H, W) in [-1, 1] of requests.
        team: The processes that share the work.

    Raises:
        InputError: What another process rendered cannot be seen.
    """
    wanted = {item.image: item.caption for item in items if isinstance(item.image, RenderedImage)}
    lacking = [(image, prompt) for image, prompt in wanted.items() if not image.path.exists()]
    batches = [lacking[start : start + RENDERED_AT_ONCE] for start in range(0, len(lacking), RENDERED_AT_ONCE)]
    for batch in team.share(batches, "Rendering class images"):
        pixels = render([image.request(prompt) for image, prompt in batch])
        for (image, _), picture in zip(batch, pixels, strict=True):
            image.write(picture)
    if unseen := next((image.path for image in wanted if not image.path.exists()), None):
        raise InputError(f"{unseen} is not there on every machine: put the prior's root where all can see it")


def holds_images(folder: Path) -> bool:
    """Tells whether there is an image in a folder or in those below it."""
    return any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*"))
