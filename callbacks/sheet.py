"""Pictures: from pixels, on contact sheets, to loggers."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, TEXT_HEIGHT = 8, 16
MOST_LINES = 12
"""Lines of a caption that are drawn; one of a hundred thousand letters would make a sheet of gigabytes."""


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Turns pixels (B, 3, H, W) or (B, 1, H, W), clamped to [-1, 1], into pictures."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def contact_sheet(
    rows: Mapping[str, Sequence[Image.Image]],
    captions: Sequence[str],
    side: int = 256,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Lays pictures out with a title a row and a caption a column.

    Args:
        rows: Title and pictures of each row.
        captions: Caption of each column.
        side: Width and height in pixels of the square that each picture is fitted into.
        resample: How pictures are brought to that size.
    """
    font = ImageFont.load_default(12)
    lines = [wrap(caption, font, side) for caption in captions]
    top = MARGIN + TEXT_HEIGHT * max(len(column) for column in lines)
    cell, row_height = side + MARGIN, side + MARGIN + TEXT_HEIGHT
    sheet = Image.new("RGB", (MARGIN + cell * len(captions), top + row_height * len(rows) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(lines):
        draw.text((MARGIN + column * cell, MARGIN // 2), "\n".join(caption), "black", font)
    for row, (title, pictures) in enumerate(rows.items()):
        y = top + row * row_height
        draw.text((MARGIN, y), title, "gray", font)
        for column, picture in enumerate(pictures):
            sheet.paste(fitted(picture, side, resample), (MARGIN + column * cell, y + TEXT_HEIGHT))
    return sheet


def fitted(picture: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """Returns a picture in its own proportions, the longer side brought to a length in pixels."""
    longer = max(picture.size)
    width, height = (max(1, round(length * side / longer)) for length in picture.size)
    return picture.resize((width, height), resample)


def log_pictures(
    loggers: Iterable[Logger], name: str, pictures: list[Image.Image], captions: list[str], step: int
) -> None:
    """Hands pictures to TensorBoard and to loggers with a log_image method, such as W&B's."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for index, picture in enumerate(pictures):
                logger.experiment.add_image(f"{name}/{index:02d}", np.asarray(picture), step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            logger.log_image(name, pictures, step=step, caption=captions)  # type: ignore[attr-defined]


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Breaks the beginning of a text into lines that fit a width in pixels, between words; words are cut to fit."""
    lines = [""]
    for word in text[: MOST_LINES * width].split():  # no letter is narrower than a pixel
        while font.getlength(word) > width and len(word) > 1:
            word = word[: len(word) // 2]
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."]
