"""Finds the image files of a folder and decodes pictures, whether they are files or not."""

import hashlib
import logging
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from os import SEEK_CUR
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lit_edm.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp")
OTHER_SUFFIXES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl")  # pictures that are not read
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What is read, whatever a file is called: not, say, PostScript, which is a program that Pillow would have run."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_EXIF = (b"eXIf", b"iTXtXML:com.adobe.xmp", b"tEXtRaw profile type exif", b"zTXtRaw profile type exif")

logger = logging.getLogger(__name__)


class ImageSource(ABC):
    """One picture, wherever it is; small and without its pixels, so that the workers of data loaders get it cheaply.

    Its methods raise an InputError that names it if it cannot be read.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call the picture."""

    @abstractmethod
    def open(self) -> BinaryIO:
        """Opens the encoded picture."""

    def read(self) -> Image.Image:
        """Returns the picture as RGB, turned upright as its EXIF data say, transparent parts on white."""
        with self.opened() as image:
            return _flatten(_to_8_bits(ImageOps.exif_transpose(image)), "white").convert("RGB")

    def size(self) -> tuple[int, int]:
        """Returns the height and width of the upright picture in pixels, without decoding these."""
        with self.opened() as image, self.open() as file:
            width, height = image.size
            is_turned = _exif(image, file).get(ExifTags.Base.Orientation) in range(5, 9)
            return (width, height) if is_turned else (height, width)

    def digest(self) -> str:
        """Returns the SHA-256 of the encoded picture, which tells pictures apart, whatever they are called."""
        with self._blamed(), self.open() as file:
            return hashlib.sha256(file.read()).hexdigest()

    def check(self) -> None:
        """Decodes the picture, as cheaply as its format lets it be, and forgets it."""
        with self.opened() as image:
            image.draft(None, (1, 1))  # lets JPEGs be decoded at an eighth of their size
            image.load()
            image.getexif()

    @contextmanager
    def opened(self) -> Iterator[Image.Image]:
        """Opens the picture with Pillow; what goes wrong before it is closed is blamed on the picture."""
        with self._blamed(), self.open() as file, Image.open(file, formats=FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:  # here Pillow only warns
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            yield image

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            limit = f"more than {Image.MAX_IMAGE_PIXELS} pixels are refused as a decompression bomb"
            raise InputError(f"{self.name} is too large ({limit}): delete it or save it smaller") from error
        except Exception as error:  # damage makes Pillow raise OSError, SyntaxError, struct.error, EOFError, ...
            why = "it is none" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
            raise InputError(f"{self.name} cannot be read as an image ({why}): delete it or save it again") from error


@dataclass(frozen=True)
class ImageFile(ImageSource):
    """A picture in a file of its own.

    Args:
        path: The file.
    """

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def open(self) -> BinaryIO:
        """Opens the file."""
        return self.path.open("rb")


class Checked(Protocol):
    """What can tell whether it can be used."""

    def check(self) -> None:
        """Raises InputError if it cannot."""
        ...


def check_images(images: Iterable[Checked]) -> None:
    """Decodes every image once, so that a broken one is named before training and not after hours of it."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda image: image.check(), images):
            pass  # a failure is raised where its result is asked for


def read_mask(source: ImageSource) -> Image.Image:
    """Returns a mask as grey (mode L), turned upright: white counts, black and transparent parts do not."""
    with source.opened() as image:
        return _flatten(_to_8_bits(ImageOps.exif_transpose(image)), "black").convert("L")


def find_images(root: Path) -> list[Path]:
    """Returns the image files in a folder and the folders below it, sorted; hidden ones are left out.

    Those of other formats are left out with a warning.
    """
    if not root.exists():
        raise InputError(f"{root} does not exist: give the folder of the images as data.init_args.root")
    if not root.is_dir():
        raise InputError(f"{root} is a file: give the folder of the images as data.init_args.root")
    files = [path for path in root.rglob("*") if path.is_file()]
    seen = sorted(path for path in files if not is_hidden(path, root))
    images = [path for path in seen if path.suffix.lower() in SUFFIXES]
    others = [path for path in seen if path.suffix.lower() in OTHER_SUFFIXES]
    formats = ", ".join(sorted({path.suffix.lower() for path in others}))
    if not images:
        looked_for = f"{', '.join(SUFFIXES)}; other files there: {len(files)}"
        remedy = f"save its {formats} as PNG" if others else "put some there"
        raise InputError(f"{root} holds no images ({looked_for}): {remedy} or correct data.init_args.root")
    if others:
        logger.warning("%d picture(s) left out (%s), the first: %s; save them as PNG", len(others), formats, others[0])
    return images


def is_hidden(path: Path, root: Path) -> bool:
    """Tells whether the name of a file, or of a folder between it and the root, begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _to_8_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8 rather than scale
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _flatten(image: Image.Image, ground: str) -> Image.Image:
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image.convert("RGBA"))


def _exif(image: Image.Image, file: BinaryIO) -> Image.Exif:
    # PNG's own getexif decodes the pixels, in case that something stands behind them.
    return Image.Image.getexif(image) if _is_png_without_exif_at_end(file) else image.getexif()


def _is_png_without_exif_at_end(file: BinaryIO) -> bool:
    if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
        return False
    is_behind_pixels = False
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        is_behind_pixels |= kind == b"IDAT"
        start = file.read(min(length, max(map(len, PNG_EXIF))))
        if is_behind_pixels and (kind + start).startswith(PNG_EXIF):
            return False
        file.seek(length - len(start) + 4, SEEK_CUR)  # past its checksum too
    return True
