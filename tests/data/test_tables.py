import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lit_edm.data.tables import find_tables, read_rows
from lit_edm.errors import InputError

Write = Callable[..., Path]


@pytest.fixture
def csv(tmp_path: Path) -> Callable[[str], Path]:
    """Writes metadata.csv."""

    def write(text: str) -> Path:
        path = tmp_path / "metadata.csv"
        path.write_bytes(text.encode())
        return path

    return write


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(row.place, row.columns) for row in read_rows(path)]


def test_jsonl_as_windows_editors_write_it(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_bytes('\ufeff{"text": "caf\u00e9\u2028"}\r\n\r\n{"text": "b"}'.encode())
    assert _read(path) == [("line 1", {"text": "caf\u00e9\u2028"}), ("line 3", {"text": "b"})]


@pytest.mark.parametrize(
    ("row", "message"),
    [(["b.png", "x"], "not a JSON object: write it as"), ("{'file_name': 'b.png'}", r"not JSON \(.*\): write one")],
)
def test_wrong_line_of_jsonl(write_metadata: Write, row: object, message: str) -> None:
    with pytest.raises(InputError, match=rf"metadata\.jsonl, line 3: {message}"):
        read_rows(write_metadata({}, "", row))


def test_csv_as_spreadsheets_write_it(csv: Callable[[str], Path]) -> None:
    path = csv('\ufefffile_name,text\r\n\r\na.png,"caf\u00e9, ""x""\r\ny"\r\n,\r\nb.png, "1, 2"\r\n')
    assert _read(path) == [
        ("line 3", {"file_name": "a.png", "text": 'caf\u00e9, "x"\ny'}),
        ("line 6", {"file_name": "b.png", "text": "1, 2"}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name;text\na.png;x\n", "line 1: no comma in the header 'file_name;text': separate columns by commas"),
        ("\nfile_name\ttext\n", "line 2: no comma in the header"),
        ("text,file_name,text\n", r"line 1: a column is there twice \(text, file_name, text\)"),
        ("file_name,text\na.png,x\nb.png,red, round\n", "line 3: 3 fields under a header of 2: put fields"),
        ("file_name,text\n\na.png\n", "line 3: 1 fields under a header of 2"),
        ('file_name,text\na.png,"x\n\n', r"line 2: not CSV \(.*\): check its double quotes"),
        ('file_name,text\na.png,"x"y\n', r"line 2: not CSV \(.*\)"),
    ],
)
def test_wrong_csv(csv: Callable[[str], Path], text: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"metadata\.csv, {message}"):
        read_rows(csv(text))


@pytest.mark.parametrize("text", ["", "\n\n", "file_name,text\n"])
def test_empty_csv(csv: Callable[[str], Path], text: str) -> None:
    with pytest.raises(InputError, match=r"metadata\.csv is empty: write a row for each image"):
        read_rows(csv(text))


def test_empty_jsonl(write_metadata: Write) -> None:
    with pytest.raises(InputError, match=r"metadata\.jsonl is empty"):
        read_rows(write_metadata())


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_table_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=rf"{name} is not UTF-8"):
        read_rows(tmp_path / name)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "key=value" / "metadata.parquet"  # no partition to be read from the name
    path.parent.mkdir()
    parquet.write_table(pyarrow.table({"file_name": ["a.png", "b.png"], "text": ["caf\u00e9", None]}), path)
    assert _read(path) == [
        ("row 0 (counted from 0)", {"file_name": "a.png", "text": "caf\u00e9"}),
        ("row 1 (counted from 0)", {"file_name": "b.png", "text": None}),
    ]


def test_damaged_parquet(tmp_path: Path) -> None:
    (tmp_path / "metadata.parquet").write_text("no table")
    with pytest.raises(InputError, match=r"metadata\.parquet is not a Parquet file \(.*\): write it again") as error:
        read_rows(tmp_path / "metadata.parquet")
    assert "\n" not in str(error.value)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"metadata\.parquet: pyarrow, .*pip install 'lit-edm\[data\]'"):
        read_rows(tmp_path / "metadata.parquet")


def test_finds_the_table_of_each_folder(tmp_path: Path) -> None:
    names = ["metadata.csv", "a/metadata.jsonl", "a/b/metadata.parquet"]
    for name in [*names, "a/.hidden/metadata.csv", "a/.hidden/metadata.jsonl", "c/notes.csv"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_tables(tmp_path) == {(tmp_path / name).parent: tmp_path / name for name in names}


def test_two_tables_in_a_folder(tmp_path: Path) -> None:
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"has both metadata\.csv and metadata\.jsonl: delete one"):
        find_tables(tmp_path)
