import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from lit_edm.data.folder import CaptionedImage, find_captioned_images
from lit_edm.data.images import ImageFile, check_images
from lit_edm.errors import InputError

Save = Callable[..., Path]
Write = Callable[..., Path]


def _names(images: list[CaptionedImage], root: Path) -> list[str]:
    return [Path(image.image.name).relative_to(root).as_posix() for image in images]


def test_captions_of_metadata(tmp_path: Path, save: Save, write_metadata: Write) -> None:
    first, second = save("a/1.png"), save("b.png")
    write_metadata({"file_name": "./b.png", "prompt": "two\u2028lines"}, "", {"file_name": "a/1.png", "prompt": "one"})
    assert find_captioned_images(tmp_path) == [
        CaptionedImage(ImageFile(first), "one"),
        CaptionedImage(ImageFile(second), "two\u2028lines"),
    ]


def test_captions_of_text_files(tmp_path: Path, save: Save) -> None:
    images = [save("a/b.c.jpg"), save("d.png")]
    (tmp_path / "a/b.c.txt").write_text(" one\n")
    (tmp_path / "d.caption").write_text("two")
    assert find_captioned_images(tmp_path) == [
        CaptionedImage(ImageFile(images[0]), "one"),
        CaptionedImage(ImageFile(images[1]), "two"),
    ]


def test_metadata_comes_before_text_files_and_those_before_the_prompt(
    tmp_path: Path, save: Save, write_metadata: Write
) -> None:
    def captions() -> list[str]:
        return [image.caption for image in find_captioned_images(tmp_path, instance_prompt="a TOK")]

    save("a.png")
    assert captions() == ["a TOK"]
    (tmp_path / "a.txt").write_text("of the text file")
    save("b.png")
    assert captions() == ["of the text file", "a TOK"]
    write_metadata({"file_name": "a.png", "text": "of the row"}, {"file_name": "b.png", "text": "of its row"})
    assert captions() == ["of the row", "of its row"]


@pytest.mark.parametrize("setting", ["caption_column", "image_column", "mask_column"])
def test_column_without_metadata(tmp_path: Path, save: Save, setting: str) -> None:
    save("a.png")
    tables = r"metadata\.jsonl or metadata\.csv or metadata\.parquet"
    with pytest.raises(InputError, match=rf"has no {tables} to read data\.init_args\.{setting} \('text'\) from"):
        find_captioned_images(tmp_path, instance_prompt="a TOK", **{setting: "text"})


def test_images_without_a_row_are_left_out_with_a_warning(
    tmp_path: Path, save: Save, write_metadata: Write, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abc":
        save(f"{name}.png")
    write_metadata({"file_name": "a.png", "text": "x"})
    assert _names(find_captioned_images(tmp_path, instance_prompt="a TOK"), tmp_path) == ["a.png"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"2 image(s) without a row in {tmp_path / 'metadata.jsonl'} left out" in caplog.text
    assert "first: " + str(tmp_path / "b.png") in caplog.text


def test_image_without_caption(tmp_path: Path, save: Save) -> None:
    save("a.png")
    save("b.png")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"b\.png has no caption: .*b\.txt.*data\.init_args\.instance_prompt"):
        find_captioned_images(tmp_path)


def _write_jsonl(path: Path, rows: list[dict[str, str | None]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def _write_csv(path: Path, rows: list[dict[str, str | None]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, rows: list[dict[str, str | None]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("suffix", "write"), [("jsonl", _write_jsonl), ("csv", _write_csv), ("parquet", _write_parquet)]
)
def test_every_format_says_the_same(tmp_path: Path, save: Save, suffix: str, write: Callable[..., None]) -> None:
    first, second, mask = save("a/1.png"), save("b.png"), save("m.png")
    rows = [
        {"file_name": "a/1.png", "text": 'one, "1"', "mask_file_name": "m.png"},
        {"file_name": "./b.png", "text": "two", "mask_file_name": None},
    ]
    write(tmp_path / f"metadata.{suffix}", rows)
    assert find_captioned_images(tmp_path) == [
        CaptionedImage(ImageFile(first), 'one, "1"', ImageFile(mask)),
        CaptionedImage(ImageFile(second), "two"),
    ]


def test_nearest_metadata_counts(
    tmp_path: Path, save: Save, write_metadata: Write, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("z.png", "a/x.png", "a/deep/y.png", "a/b/x.png"):
        save(name)
    (tmp_path / "a/b/metadata.csv").write_text("file_name,caption\nx.png,of the csv\n")
    write_metadata({"file_name": "x.png", "text": "of a"}, {"file_name": "deep/y.png", "text": "of a, deep"})
    (tmp_path / "metadata.jsonl").rename(tmp_path / "a/metadata.jsonl")
    images = find_captioned_images(tmp_path, instance_prompt="the prompt")  # for the only one without a table above
    assert _names(images, tmp_path) == ["a/b/x.png", "a/deep/y.png", "a/x.png", "z.png"]
    assert [image.caption for image in images] == ["of the csv", "of a, deep", "of a", "the prompt"]
    assert not caplog.records


def test_row_of_an_image_that_a_nearer_table_lists(tmp_path: Path, save: Save, write_metadata: Write) -> None:
    save("a/x.png")
    (tmp_path / "a/metadata.csv").write_text("file_name,caption\nx.png,near\n")
    write_metadata({"file_name": "a/x.png", "text": "far"})
    with pytest.raises(
        InputError, match=r"metadata\.jsonl, line 1: .*a/x\.png belongs to .*a/metadata\.csv, which is nearer"
    ):
        find_captioned_images(tmp_path)


@pytest.mark.parametrize("ending", [".mask.png", "-masklabel.png", ".Mask.PNG"])
def test_masks_beside_images(tmp_path: Path, save: Save, write_metadata: Write, ending: str) -> None:
    image, mask, other = save("a/b.c.jpg"), save(f"a/b.c{ending}"), save("d.png")
    wanted = [CaptionedImage(ImageFile(image), "x", ImageFile(mask)), CaptionedImage(ImageFile(other), "x")]
    assert find_captioned_images(tmp_path, instance_prompt="x") == wanted
    write_metadata({"file_name": "a/b.c.jpg", "text": "x"}, {"file_name": "d.png", "text": "x"})
    assert find_captioned_images(tmp_path) == wanted


def test_mask_without_an_image(tmp_path: Path, save: Save) -> None:
    save("a.png")
    save("b/a.mask.png")
    with pytest.raises(InputError, match=r"b/a\.mask\.png is named as a mask is, but there is no image .*b/a: add it"):
        find_captioned_images(tmp_path, instance_prompt="x")


def test_mask_of_another_name_that_a_row_names(tmp_path: Path, save: Save, write_metadata: Write) -> None:
    save("a.png")
    mask = save("b.mask.png")
    write_metadata({"file_name": "a.png", "text": "x", "mask_file_name": "b.mask.png"})
    assert [image.mask for image in find_captioned_images(tmp_path)] == [ImageFile(mask)]


def test_two_masks_of_an_image(tmp_path: Path, save: Save) -> None:
    for name in ("a.jpg", "a.mask.png", "a-masklabel.png"):
        save(name)
    with pytest.raises(InputError, match=r"a has two masks, a-masklabel\.png and a\.mask\.png: delete one"):
        find_captioned_images(tmp_path, instance_prompt="x")


def test_check_finds_a_mask_of_another_size(tmp_path: Path, save: Save) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save("a.jpg", Image.new("RGB", (48, 32)), exif=exif)
    save("a.mask.png", Image.new("L", (32, 48)))  # as the image is seen
    check_images(find_captioned_images(tmp_path, instance_prompt="x"))
    save("a.mask.png", Image.new("L", (48, 32)))
    with pytest.raises(InputError, match=r"a\.mask\.png is 48 x 32 pixels, its image .*a\.jpg 32 x 48: make the mask"):
        check_images(find_captioned_images(tmp_path, instance_prompt="x"))


@pytest.mark.parametrize("broken", ["a.png", "a.mask.png"])
def test_check_finds_a_broken_file(tmp_path: Path, save: Save, broken: str) -> None:
    save("a.png")
    save("a.mask.png")
    images = find_captioned_images(tmp_path, instance_prompt="x")
    check_images(images)
    (tmp_path / broken).write_bytes(b"none")
    with pytest.raises(InputError, match=rf"{broken} cannot be read"):
        check_images(images)


def test_placeholders_stay(tmp_path: Path, save: Save) -> None:
    save("a.png").with_suffix(".txt").write_text("a photo of <s0><s1> TOK")
    assert find_captioned_images(tmp_path)[0].caption == "a photo of <s0><s1> TOK"


def test_home_folder_is_expanded(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    save("photos/a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(find_captioned_images("~/photos", instance_prompt="a TOK")) == 1
