"""Finds the images of a folder, their captions and their masks."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_edm.data.captions import read_sidecar
from lit_edm.data.images import ImageFile, ImageSource, find_images
from lit_edm.data.metadata import Columns, Entry, read_metadata
from lit_edm.data.tables import READERS, find_tables
from lit_edm.errors import InputError

MASK_ENDINGS = (".mask.png", "-masklabel.png")  # the second is OneTrainer's

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionedImage:
    """A picture and what is said of it.

    Args:
        image: The picture.
        caption: What is said of it, placeholders not yet replaced.
        mask: A picture of the same size: white where pixels count, black where they do not. All count if not given.
    """

    image: ImageSource
    caption: str
    mask: ImageSource | None = None

    def check(self) -> None:
        """Decodes picture and mask once.

        Raises:
            InputError: One of them is broken, or they differ in size.
        """
        self.image.check()
        if self.mask is None:
            return
        self.mask.check()
        (height, width), (mask_height, mask_width) = self.image.size(), self.mask.size()
        if (height, width) != (mask_height, mask_width):
            raise InputError(
                f"{self.mask.name} is {mask_width} x {mask_height} pixels, its image {self.image.name} "
                f"{width} x {height}: make the mask as large as its image"
            )


def find_captioned_images(
    root: Path | str,
    caption_column: str | None = None,
    image_column: str | None = None,
    mask_column: str | None = None,
    instance_prompt: str | None = None,
    unlisted: Collection[Path] = (),
) -> list[CaptionedImage]:
    """Finds the images of a folder, their captions and their masks.

    The rows of a metadata.jsonl, .csv (commas between columns) or .parquet name the images of its folder and of the
    folders below it that have none of their own, and say their captions. The caption of any other image is the .txt or
    .caption file of the same name, or else the instance prompt. Masks are named in the rows, or lie beside their
    images: photo.mask.png or photo-masklabel.png is the mask of photo.jpg.

    Args:
        root: Folder of images, searched with the folders below it.
        caption_column: Column of the captions; found by itself if there is only one.
        image_column: Column of the images' names; file_name if not given.
        mask_column: Column of the masks' names, empty for images without one; mask_file_name if not given.
        instance_prompt: Caption of images without one of their own.
        unlisted: Images that may be without a row beside others, so that no warning is given of them.

    Returns:
        The captioned images, sorted by path.

    Raises:
        InputError: An image has no caption, a row no image, a mask no image, or something cannot be understood.
    """
    root = Path(root).expanduser()
    settings = Columns(caption_column, image_column, mask_column)
    files = find_images(root)
    images = [path for path in files if _masked_stem(path) is None]
    tables = find_tables(root)
    if not tables:
        _refuse_columns(root, settings)
    table_of = {image: next((tables[f] for f in image.parents if f in tables), None) for image in images}
    found = {image: _read_beside(image, instance_prompt) for image, table in table_of.items() if table is None}
    for table in tables.values():
        found |= _read_table(table, table_of, settings, instance_prompt, unlisted)
    named = {entry.mask for entry in found.values()}
    mask_of = _masks_beside(images, [path for path in files if _masked_stem(path) and path not in named])
    return [_captioned(image, found[image], mask_of) for image in images if image in found]


def _captioned(image: Path, entry: Entry, mask_of: Mapping[Path, Path]) -> CaptionedImage:
    mask = entry.mask or mask_of.get(image.with_suffix(""))
    return CaptionedImage(ImageFile(image), entry.caption, mask and ImageFile(mask))


def _read_beside(image: Path, instance_prompt: str | None) -> Entry:
    caption = read_sidecar(image) or instance_prompt
    if caption is None:
        wanted = f"{image.stem}.txt beside it, a row in metadata.jsonl or data.init_args.instance_prompt"
        raise InputError(f"{image} has no caption: give it {wanted}")
    return Entry(caption, None)


def _read_table(
    table: Path,
    table_of: Mapping[Path, Path | None],
    settings: Columns,
    instance_prompt: str | None,
    unlisted: Collection[Path],
) -> dict[Path, Entry]:
    entries = read_metadata(table, table_of, settings, instance_prompt)
    masks = {entry.mask for entry in entries.values()}
    if both := next((image for image in entries if image in masks), None):
        raise InputError(f"{table}: {both} is both an image and a mask: delete its own row")
    accounted = {*entries, *masks, *unlisted}
    if left_out := [image for image, owner in table_of.items() if owner == table and image not in accounted]:
        logger.warning("%d image(s) without a row in %s left out, the first: %s", len(left_out), table, left_out[0])
    return entries


def _refuse_columns(root: Path, settings: Columns) -> None:
    for setting, column in settings._asdict().items():
        if column is not None:
            raise InputError(f"{root} has no {' or '.join(READERS)} to read data.init_args.{setting} ({column!r}) from")


def _masks_beside(images: Sequence[Path], masks: Sequence[Path]) -> dict[Path, Path]:
    """Returns the masks by the paths of their images without suffix."""
    stems, mask_of = {image.with_suffix("") for image in images}, dict[Path, Path]()
    for mask in masks:
        stem = _masked_stem(mask)
        if stem not in stems:
            raise InputError(f"{mask} is named as a mask is, but there is no image {stem}: add it, or rename the mask")
        if other := mask_of.get(stem):
            raise InputError(f"{stem} has two masks, {other.name} and {mask.name}: delete one of them")
        mask_of[stem] = mask
    return mask_of


def _masked_stem(path: Path) -> Path | None:
    """Returns the path of a mask's image without suffix, or None if the name is not that of a mask."""
    stems = [path.name[: -len(ending)] for ending in MASK_ENDINGS if path.name.lower().endswith(ending)]
    return path.with_name(stems[0]) if stems and stems[0] else None
