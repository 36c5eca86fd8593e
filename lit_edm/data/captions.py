"""Reads captions: the rows of metadata.jsonl, or a text file beside each image."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_edm.data.images import SUFFIXES
from lit_edm.errors import InputError

METADATA = "metadata.jsonl"
FILE_NAME = "file_name"
USUAL_COLUMNS = ("text", "caption", "prompt")


def read_metadata(root: Path, images: Collection[Path], caption_column: str | None = None) -> dict[Path, str]:
    """Reads the captions of metadata.jsonl, laid out as the ImageFolder of `datasets` wants it.

    Args:
        root: Folder of the images, with metadata.jsonl in it.
        images: The images found in the folder.
        caption_column: Column of the captions; by default the only one with text in it, or the only one of that is
            called text, caption or prompt.

    Returns:
        The caption of each image that has a row.
    """
    rows = _read_rows(root / METADATA)
    column = caption_column or _find_caption_column(root / METADATA, rows)
    known, row_of = set(images), dict[Path, _Row]()
    for row in rows:
        path = row.image(root)
        if path not in known:
            raise InputError(f"{row}: no image {path} found ({', '.join(SUFFIXES)}): add it or delete the row")
        if path in row_of:
            raise InputError(f"{row}: {path} has a row in line {row_of[path].line} too: keep one of them")
        row_of[path] = row
    return {path: row.text(column) for path, row in row_of.items()}


def read_sidecar(image: Path) -> str | None:
    """Returns what stands in the text file of an image's name, or None where there is no such file."""
    path = image.with_suffix(".txt")
    if not path.is_file():
        return None
    caption = _read(path).strip()
    if not caption:
        raise InputError(f"{path} is empty: write the caption of {image.name} into it")
    return caption


@dataclass(frozen=True)
class _Row:
    """One row of metadata.jsonl, which as a string says where it stands."""

    path: Path
    line: int
    columns: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}"

    def text(self, column: str) -> str:
        """Returns what a column says, which has to be text."""
        if column not in self.columns:
            remedy = "add it" if column == FILE_NAME else "add it or correct data.init_args.caption_column"
            raise InputError(f"{self}: no {column!r} among the columns {_listed(self.columns)}: {remedy}")
        value = self.columns[column]
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{self}: {column!r} is {value!r}: write some text there")
        return value

    def image(self, root: Path) -> Path:
        """Returns the path of the row's image, which has to lie in the folder."""
        name = Path(self.text(FILE_NAME))
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"{self}: {str(name)!r} leads out of the folder: write it relative to {root}")
        return root / name


def _read_rows(path: Path) -> list[_Row]:
    lines = enumerate(_read(path).split("\n"), start=1)  # splitlines would also split at U+2028, legal within JSON
    rows = [_parse_row(path, number, line) for number, line in lines if line.strip()]
    if not rows:
        raise InputError(f"{path} is empty: write a row for each image or delete it")
    return rows


def _parse_row(path: Path, number: int, line: str) -> _Row:
    try:
        columns = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error}): write one object a line") from error
    if not isinstance(columns, dict):
        raise InputError(f'{path}, line {number}: not a JSON object: write it as {{"file_name": ..., "text": ...}}')
    return _Row(path, number, columns)


def _find_caption_column(path: Path, rows: Sequence[_Row]) -> str:
    with_text = {name: None for row in rows for name, value in row.columns.items() if isinstance(value, str)}
    columns = [name for name in with_text if name != FILE_NAME]
    candidates = columns if len(columns) == 1 else [name for name in USUAL_COLUMNS if name in columns]
    if len(candidates) != 1:
        raise InputError(
            f"{path}: cannot tell which column holds the captions, of those with text in them ({_listed(columns)}): "
            "name it in data.init_args.caption_column"
        )
    return candidates[0]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors begin UTF-8 with a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from error


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) or "none"
