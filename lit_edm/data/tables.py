"""Reads the rows of metadata.jsonl, .csv and .parquet."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from lit_edm.data.captions import listed, read_text
from lit_edm.data.images import is_hidden
from lit_edm.errors import InputError


@dataclass(frozen=True)
class Row:
    """One row of a table, which as a string says where it stands."""

    path: Path
    place: str
    columns: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.path}, {self.place}"

    def text(self, column: str, setting: str) -> str:
        """Returns what a column, which a setting can name, says; this has to be text."""
        if column not in self.columns:
            raise InputError(
                f"{self}: no {column!r} among the columns {listed(self.columns)}: "
                f"add it or correct data.init_args.{setting}"
            )
        value = self.columns[column]
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{self}: {column!r} is {value!r}: write some text there")
        if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):  # which JSON can spell
            raise InputError(f"{self}: {column!r} is {value[:80]!r}, with what is no character in it: write it anew")
        return value

    def file(self, column: str, setting: str) -> Path:
        """Returns the path of the file that a column names, which has to lie in the table's folder."""
        folder, name = self.path.parent, Path(self.text(column, setting))
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"{self}: {str(name)!r} leads out of the folder: write it relative to {folder}")
        # In the Hub's cache all files are links to a folder beside, the table as well.
        homes, target = (folder.resolve(), self.path.resolve().parent), (folder / name).resolve()
        if not any(target.is_relative_to(home) for home in homes):
            raise InputError(f"{self}: {str(name)!r} is a link that leads out of {folder}: put the file itself there")
        return folder / name

    def is_there(self, path: Path) -> bool:
        """Tells whether a path that the row names is a file."""
        try:
            return path.is_file()
        except OSError:  # no file has so long a name
            return False


def find_tables(root: Path) -> dict[Path, Path]:
    """Finds the tables in a folder and the folders below it; returns that of each folder with one."""
    found: dict[Path, Path] = {}
    paths = [path for name in READERS for path in root.rglob(name) if path.is_file() and not is_hidden(path, root)]
    for path in sorted(paths):
        if other := found.get(path.parent):
            raise InputError(f"{path.parent} has both {other.name} and {path.name}: delete one of them")
        found[path.parent] = path
    return found


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a table, at least one."""
    rows = [Row(path, place, columns) for place, columns in READERS[path.name](path)]
    if not rows:
        raise InputError(f"{path} is empty: write a row for each image or delete it")
    return rows


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = enumerate(read_text(path).split("\n"), start=1)  # splitlines would also split at U+2028, legal within JSON
    for number, line in lines:
        if line.strip():
            yield f"line {number}", _parse_json(f"{path}, line {number}", line)


def _parse_json(place: str, line: str) -> dict[str, Any]:
    try:
        columns = json.loads(line)
    except (ValueError, RecursionError) as error:  # RecursionError of lists in lists in lists
        raise InputError(f"{place}: not JSON ({error}): write one object a line") from error
    if not isinstance(columns, dict):
        raise InputError(f'{place}: not a JSON object: write it as {{"file_name": ..., "text": ...}}')
    return columns


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = _split_csv(path)
    line, header = next(rows, (1, []))
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise InputError(f"{path}, line {line}: no comma in the header {header[0]!r}: separate columns by commas")
    if len(set(header)) < len(header):
        raise InputError(f"{path}, line {line}: a column is there twice ({listed(header)}): rename or delete one")
    for line, fields in rows:
        if len(fields) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(fields)} fields under a header of {len(header)}: "
                'put fields that have commas in them between double quotes (")'
            )
        yield f"line {line}", dict(zip(header, fields, strict=True))


def _split_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(StringIO(read_text(path)), strict=True, skipinitialspace=True)
    line = 1
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield line, fields
            line = reader.line_num + 1  # a row begins where the last ended; fields in quotes may have several lines
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not CSV ({error}): check its double quotes") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path}: pyarrow, which reads it, is not installed: pip install 'lit-edm[data]'") from error
    try:
        rows = ParquetFile(path).read().to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} is not a Parquet file ({' '.join(str(error).split())}): write it again") from error
    for number, columns in enumerate(rows):
        yield f"row {number} (counted from 0)", columns


READERS = {"metadata.jsonl": _read_jsonl, "metadata.csv": _read_csv, "metadata.parquet": _read_parquet}
