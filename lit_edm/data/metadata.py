"""Reads what metadata.jsonl, .csv and .parquet say of images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lit_edm.data.captions import find_caption_column
from lit_edm.data.images import SUFFIXES
from lit_edm.data.tables import Row, read_rows
from lit_edm.errors import InputError

FILE_NAME = "file_name"
MASK_FILE_NAME = "mask_file_name"


class Columns(NamedTuple):
    """The settings that name columns of a table; None where the usual ones are meant."""

    caption_column: str | None = None
    image_column: str | None = None
    mask_column: str | None = None


class Entry(NamedTuple):
    """What a row says of its image."""

    caption: str
    mask: Path | None


def read_metadata(
    path: Path, table_of: Mapping[Path, Path | None], settings: Columns, instance_prompt: str | None = None
) -> dict[Path, Entry]:
    """Reads a table, laid out as the ImageFolder of `datasets` wants it.

    Args:
        path: The table.
        table_of: All images, and the table that each belongs to.
        settings: Which columns hold the captions, by default the only one with text in it, or the only one of that is
            called text, caption or prompt; the names of the images, by default file_name; and those of their masks, by
            default mask_file_name if there is such a column.
        instance_prompt: Caption of all, should there be no column with text at all.

    Returns:
        What each image's row says, for the images that have one.
    """
    rows = read_rows(path)
    names, masks = settings.image_column or FILE_NAME, _find_mask_column(rows, settings.mask_column)
    captions = _find_caption_column(rows, settings.caption_column, {names, masks}, instance_prompt)
    row_of = dict[Path, Row]()
    for row in rows:
        image = row.file(names, "image_column")
        _check_image(row, image, table_of, row_of)
        row_of[image] = row
    return {
        image: Entry(row.text(captions, "caption_column") if captions else str(instance_prompt), _mask(row, masks))
        for image, row in row_of.items()
    }


def _check_image(row: Row, image: Path, table_of: Mapping[Path, Path | None], row_of: Mapping[Path, Row]) -> None:
    if image not in table_of:
        raise InputError(f"{row}: no image {image} found ({', '.join(SUFFIXES)}): add it or delete the row")
    if table_of[image] != row.path:
        raise InputError(f"{row}: {image} belongs to {table_of[image]}, which is nearer: move the row there")
    if image in row_of:
        raise InputError(f"{row}: {image} has a row in {row_of[image].place} too: keep one of them")


def _mask(row: Row, column: str | None) -> Path | None:
    if column is None or row.columns.get(column) in (None, ""):
        return None
    mask = row.file(column, "mask_column")
    if not row.is_there(mask):
        raise InputError(f"{row}: no mask {mask} found: add it or leave {column!r} empty")
    return mask


def _find_mask_column(rows: Sequence[Row], wanted: str | None) -> str | None:
    if any((wanted or MASK_FILE_NAME) in row.columns for row in rows):
        return wanted or MASK_FILE_NAME
    return rows[0].text(wanted, "mask_column") if wanted else None


def _find_caption_column(
    rows: Sequence[Row], wanted: str | None, others: set[str | None], instance_prompt: str | None
) -> str | None:
    with_text = {name: None for row in rows for name, value in row.columns.items() if isinstance(value, str)}
    columns = [name for name in with_text if name not in others]
    if wanted or (instance_prompt and not columns):
        return wanted
    return find_caption_column(str(rows[0].path), columns)
