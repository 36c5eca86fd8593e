from collections.abc import Callable
from pathlib import Path

import pytest

from lit_edm.data.folder import CaptionedImage, find_captioned_images
from lit_edm.data.images import ImageFile
from lit_edm.errors import InputError

Save = Callable[..., Path]
Write = Callable[..., Path]


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


GOOD = {"file_name": "a.png", "text": "x", "mask": None}


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
        ({"file_name": "b.png", "text": "x", "mask": 5}, "'mask' is 5"),
        ({"file_name": "b.png", "text": "x", "mask": "gone.png"}, r"no mask .*/gone\.png found: .*leave 'mask' empty"),
        ({"file_name": "b.png", "text": "x", "mask": "../a.png"}, r"'\.\./a\.png' leads out of the folder"),
        ({"file_name": "b.png", "caption": "x", "width": 3}, "no 'text' among the columns file_name, caption, width"),
        ({"text": "x"}, "no 'file_name' among the columns text"),
        ({}, "no 'file_name' among the columns none"),
    ],
)
def test_wrong_row(tmp_path: Path, save: Save, write_metadata: Write, row: dict[str, object], message: str) -> None:
    save("a.png")
    save("b.png")
    (tmp_path / "a.txt").touch()
    if row.get("file_name") == "{root}/b.png":
        row = {**row, "file_name": f"{tmp_path}/b.png"}
    write_metadata(GOOD, "", row)
    with pytest.raises(InputError, match=rf"metadata\.jsonl, line 3: .*{message}") as error:
        find_captioned_images(tmp_path, caption_column="text", mask_column="mask")
    assert "\n" not in str(error.value)


def test_caption_column_that_is_not_there(tmp_path: Path, save: Save, write_metadata: Write) -> None:
    save("a.png")
    write_metadata(GOOD)
    with pytest.raises(
        InputError, match=r"line 1: no 'label' among .* file_name, text, mask: .*data\.init_args\.caption_column"
    ):
        find_captioned_images(tmp_path, caption_column="label")


@pytest.mark.parametrize("setting", ["image_column", "mask_column"])
def test_other_columns_that_are_not_there(tmp_path: Path, save: Save, write_metadata: Write, setting: str) -> None:
    save("a.png")
    write_metadata(GOOD)
    with pytest.raises(InputError, match=rf"line 1: no 'label' among .*: .*data\.init_args\.{setting}"):
        find_captioned_images(tmp_path, **{setting: "label"})


def test_column_of_the_images(tmp_path: Path, save: Save, write_metadata: Write) -> None:
    image = save("a.png")
    write_metadata({"photo": "a.png", "title": "x", "file_name": 7})
    assert find_captioned_images(tmp_path, image_column="photo") == [CaptionedImage(ImageFile(image), "x")]


@pytest.mark.parametrize(("column", "mask_column"), [("mask_file_name", None), ("weights", "weights")])
def test_column_of_the_masks(
    tmp_path: Path,
    save: Save,
    write_metadata: Write,
    column: str,
    mask_column: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    images, mask = [save(f"{name}.png") for name in "abc"], save("masks/a.png")
    rows: list[dict[str, object]] = [{"file_name": f"{name}.png", "text": name} for name in "abc"]
    write_metadata(rows[0] | {column: "masks/a.png"}, rows[1] | {column: ""}, rows[2])
    assert find_captioned_images(tmp_path, mask_column=mask_column) == [
        CaptionedImage(ImageFile(images[0]), "a", ImageFile(mask)),
        CaptionedImage(ImageFile(images[1]), "b"),
        CaptionedImage(ImageFile(images[2]), "c"),
    ]
    assert not caplog.records  # the mask is no image that was left out


def test_image_that_is_a_mask_too(tmp_path: Path, save: Save, write_metadata: Write) -> None:
    save("a.png")
    save("b.png")
    write_metadata(*({"file_name": name, "text": "x", "mask_file_name": "b.png"} for name in ("a.png", "b.png")))
    with pytest.raises(InputError, match=r"metadata\.jsonl: .*b\.png is both an image and a mask: delete its own row"):
        find_captioned_images(tmp_path)


def test_prompt_where_no_column_has_text(tmp_path: Path, save: Save, write_metadata: Write) -> None:
    save("a.png")
    mask = save("m.png")
    write_metadata({"file_name": "a.png", "mask_file_name": "m.png", "width": 3})
    (image,) = find_captioned_images(tmp_path, instance_prompt="a TOK")
    assert (image.caption, image.mask) == ("a TOK", ImageFile(mask))
    write_metadata({"file_name": "a.png", "text": ""})
    with pytest.raises(InputError, match="'text' is ''"):
        find_captioned_images(tmp_path, instance_prompt="a TOK")
