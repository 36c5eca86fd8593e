"""Finds the image files of a folder and decodes them."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lit_edm.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def find_images(root: Path) -> list[Path]:
    """Returns the image files in a folder and the folders below it, sorted; hidden ones are left out."""
    if not root.exists():
        raise InputError(f"{root} does not exist: give the folder of the images as data.init_args.root")
    if not root.is_dir():
        raise InputError(f"{root} is a file: give the folder of the images as data.init_args.root")
    files = [path for path in root.rglob("*") if path.is_file()]
    images = sorted(path for path in files if _is_image(path.relative_to(root)))
    if not images:
        looked_for = f"{', '.join(SUFFIXES)}; other files there: {len(files)}"
        raise InputError(f"{root} holds no images ({looked_for}): put some there or correct data.init_args.root")
    return images


def read_image(path: Path) -> Image.Image:
    """Returns an image as RGB, turned upright as its EXIF data say, transparent parts on white."""
    with _opened(path) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


def check_images(paths: Iterable[Path]) -> None:
    """Decodes every image once, so that a broken one is named before training and not after hours of it."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(_check_image, paths):
            pass  # a failure is raised where its result is asked for


def _check_image(path: Path) -> None:
    with _opened(path) as image:
        image.draft(None, (1, 1))  # lets JPEGs be decoded at an eighth of their size
        image.load()
        image.getexif()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # damaged files make Pillow raise OSError, SyntaxError, struct.error, EOFError, ...
        raise InputError(f"{path} cannot be read as an image ({error}): delete it or save it again") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8 rather than scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _is_image(relative: Path) -> bool:
    return relative.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in relative.parts)
