# ruff: noqa: D102 (overrides are described by their base class)
"""Prior preservation: what keeps a class as the base knows it while one of its kind is learned."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lit_edm.data.buckets import Size
from lit_edm.data.folder import CaptionedImage, find_captioned_images
from lit_edm.data.images import SUFFIXES, ImageFile, is_hidden
from lit_edm.data.rendered import RenderedImage, check_rendered
from lit_edm.errors import InputError


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

    @property
    def folder(self) -> Path | None:
        """The folder that the examples are read from; None if there is none."""
        return None

    def check(self, where: str) -> None:
        """Raises InputError if a setting is out of its range; `where` is the key that they stand under."""
        if self.weight < 0:
            raise InputError(f"{where}.weight is {self.weight}: give at least 0")


@dataclass(frozen=True)
class ClassImages(Prior):
    """Images of the class in a folder, some of them rendered by the base before training, if so many are asked for.

    Args:
        root: Folder of the images; their captions are found as those of a concept's images are.
        prompt: Caption of images without one of their own, and what is rendered.
        weight: Weight of their loss, next to 1 for the concept's own images.
        num_images: Images there are to be at least. What lacks is rendered and kept in the folder, and refused in later
            runs that would have it rendered of another prompt or in another size.
    """

    root: str
    prompt: str
    weight: float = 1.0
    num_images: int = 0

    def examples(self, instances: Sequence[CaptionedImage], size: Size) -> list[CaptionedImage]:
        folder, rendered = self.folder, [ImageFile(path) for path in self.folder.glob("class_*.png")]
        if self.num_images:
            for image in rendered:
                check_rendered(image, self.prompt, size)
        found = list[CaptionedImage]()
        if holds_images(folder):
            unlisted = [image.path for image in rendered]  # no table that users write has rows of these
            found += find_captioned_images(folder, instance_prompt=self.prompt, unlisted=unlisted)
        known = {image.image for image in found}
        found += [CaptionedImage(image, self.prompt) for image in rendered if image not in known]
        if not found and not self.num_images:
            raise InputError(
                f"{folder} holds no class images: correct root of the prior, put some there, or let the base render "
                "them by giving the prior num_images"
            )
        examples = found + self._to_render(folder, size, self.num_images - len(found))
        return sorted(examples, key=lambda example: example.image.name)  # whichever run had them rendered

    @property
    def folder(self) -> Path:
        return Path(self.root).expanduser()

    def check(self, where: str) -> None:
        super().check(where)
        if self.num_images < 0:
            raise InputError(f"{where}.num_images is {self.num_images}: give at least 0")

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


def holds_images(folder: Path) -> bool:
    """Tells whether there is an image in a folder or in those below it; hidden ones do not count."""
    return any(path.suffix.lower() in SUFFIXES and not is_hidden(path, folder) for path in folder.rglob("*"))
