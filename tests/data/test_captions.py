from collections.abc import Callable
from pathlib import Path

import pytest

from lit_edm.data import CaptionedImage
from lit_edm.data.folder import find_captioned_images
from lit_edm.errors import InputError

Save = Callable[..., Path]
Write = Callable[..., Path]


def test_metadata_as_windows_editors_write_it(tmp_path: Path, save: Save) -> None:
    image = save("a.png")
    text = '\ufeff{"file_name": "a.png", "text": "caf\u00e9\u2028"}\r\n'
    (tmp_path / "metadata.jsonl").write_bytes(text.encode())
    assert find_captioned_images(tmp_path) == [CaptionedImage(image, "caf\u00e9\u2028")]


@pytest.mark.parametrize(
    ("columns", "caption_column"),
    [
        ({"title": "right"}, None),
        ({"title": "right", "width": 3}, None),
        ({"caption": "right", "artist": "wrong"}, None),
        ({"caption": "wrong", "artist": "right"}, "artist"),
        ({"text": "wrong", "prompt": "right"}, "prompt"),
    ],
)
def test_column_of_the_captions(
    tmp_path: Path, save: Save, write_metadata: Write, columns: dict[str, object], caption_column: str | None
) -> None:
    save("a.png")
    write_metadata({"file_name": "a.png", **columns})
    assert [image.caption for image in find_captioned_images(tmp_path, caption_column)] == ["right"]


@pytest.mark.parametrize(
    ("columns", "listed"),
    [
        ({"text": "x", "prompt": "y"}, r"\(text, prompt\)"),
        ({"title": "x", "artist": "y", "width": 3}, r"\(title, artist\)"),
        ({"width": 3}, r"\(none\)"),
    ],
)
def test_column_of_the_captions_unclear(
    tmp_path: Path, save: Save, write_metadata: Write, columns: dict[str, object], listed: str
) -> None:
    save("a.png")
    write_metadata({"file_name": "a.png", **columns})
    with pytest.raises(InputError, match=rf"metadata\.jsonl: .*{listed}.*data\.init_args\.caption_column"):
        find_captioned_images(tmp_path)


GOOD = {"file_name": "a.png", "text": "x"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "gone.png", "text": "x"}, r"no image .*/gone\.png found"),
        ({"file_name": "a.txt", "text": "x"}, r"no image .*/a\.txt found \(\.jpg, "),
        ({"file_name": "../a.png", "text": "x"}, r"'\.\./a\.png' leads out of the folder"),
        ({"file_name": "{root}/b.png", "text": "x"}, r"/b\.png' leads out of the folder"),
        ({"file_name": "./a.png", "text": "y"}, r"/a\.png has a row in line 1 too"),
        ({"file_name": "b.png", "text": 5}, "'text' is 5"),
        ({"file_name": "b.png", "text": None}, "'text' is None"),
        ({"file_name": "b.png", "text": " "}, "'text' is ' '"),
        ({"file_name": ["b.png"], "text": "x"}, r"'file_name' is \['b\.png'\]"),
        ({"file_name": "b.png", "caption": "x", "width": 3}, "no 'text' among the columns file_name, caption, width"),
        ({"text": "x"}, "no 'file_name' among the columns text"),
        ({}, "no 'file_name' among the columns none"),
        (["b.png", "x"], "not a JSON object"),
        ("{'file_name': 'b.png'}", r"not JSON \(.*\)"),
    ],
)
def test_wrong_row(tmp_path: Path, save: Save, write_metadata: Write, row: object, message: str) -> None:
    save("a.png")
    save("b.png")
    (tmp_path / "a.txt").touch()
    if isinstance(row, dict) and row.get("file_name") == "{root}/b.png":
        row = {**row, "file_name": f"{tmp_path}/b.png"}
    write_metadata(GOOD, "", row)
    with pytest.raises(InputError, match=rf"metadata\.jsonl, line 3: .*{message}") as error:
        find_captioned_images(tmp_path, caption_column="text")
    assert "\n" not in str(error.value)


def test_caption_column_that_is_not_there(tmp_path: Path, save: Save, write_metadata: Write) -> None:
    save("a.png")
    write_metadata(GOOD)
    with pytest.raises(
        InputError, match=r"line 1: no 'label' among .* file_name, text: .*data\.init_args\.caption_column"
    ):
        find_captioned_images(tmp_path, caption_column="label")


def test_empty_metadata(tmp_path: Path, save: Save, write_metadata: Write) -> None:
    save("a.png")
    write_metadata()
    with pytest.raises(InputError, match=r"metadata\.jsonl is empty"):
        find_captioned_images(tmp_path)


def test_empty_text_file(tmp_path: Path, save: Save) -> None:
    save("a.png")
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(InputError, match=r"a\.txt is empty: .*a\.png"):
        find_captioned_images(tmp_path, instance_prompt="a TOK")


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_text_that_is_not_utf8(tmp_path: Path, save: Save, name: str) -> None:
    save("a.png")
    (tmp_path / name).write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=rf"{name} is not UTF-8"):
        find_captioned_images(tmp_path)
