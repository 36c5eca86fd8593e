from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_edm.data import CaptionedImage, CaptionedImageFolder, SquareCrop
from lit_edm.data.folder import find_captioned_images
from lit_edm.errors import InputError

Save = Callable[..., Path]
Write = Callable[..., Path]


def test_captions_of_metadata(tmp_path: Path, save: Save, write_metadata: Write) -> None:
    first, second = save("a/1.png"), save("b.png")
    write_metadata({"file_name": "./b.png", "prompt": "two\u2028lines"}, "", {"file_name": "a/1.png", "prompt": "one"})
    assert find_captioned_images(tmp_path) == [CaptionedImage(first, "one"), CaptionedImage(second, "two\u2028lines")]


def test_captions_of_text_files(tmp_path: Path, save: Save) -> None:
    images = [save("a/b.c.jpg"), save("d.png")]
    (tmp_path / "a/b.c.txt").write_text(" one\n")
    (tmp_path / "d.txt").write_text("two")
    assert find_captioned_images(tmp_path) == [CaptionedImage(images[0], "one"), CaptionedImage(images[1], "two")]


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


def test_caption_column_without_metadata(tmp_path: Path, save: Save) -> None:
    save("a.png")
    with pytest.raises(InputError, match=r"no metadata\.jsonl .*data\.init_args\.caption_column \('text'\)"):
        find_captioned_images(tmp_path, caption_column="text", instance_prompt="a TOK")


def test_images_without_a_row_are_left_out_with_a_warning(
    tmp_path: Path, save: Save, write_metadata: Write, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abc":
        save(f"{name}.png")
    write_metadata({"file_name": "a.png", "text": "x"})
    assert [image.path.name for image in find_captioned_images(tmp_path, instance_prompt="a TOK")] == ["a.png"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "2 image(s) without a row in metadata.jsonl left out" in caplog.text
    assert "first: " + str(tmp_path / "b.png") in caplog.text


def test_image_without_caption(tmp_path: Path, save: Save) -> None:
    save("a.png")
    save("b.png")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"b\.png has no caption: .*b\.txt.*data\.init_args\.instance_prompt"):
        find_captioned_images(tmp_path)


def test_example_fulfils_the_contract(tmp_path: Path, save: Save) -> None:
    save("a.png", Image.new("RGB", (12, 8), "red"))
    dataset = CaptionedImageFolder(str(tmp_path), SquareCrop(16), instance_prompt="a TOK")
    example = dataset[0]
    assert len(dataset) == 1
    assert example["caption"] == "a TOK"
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 16, 16)
    assert torch.equal(example["image"], red)
    assert example["original_size"].tolist() == [8, 12]
    assert example["crop_top_left"].tolist() == [0, 4]
    assert example["original_size"].dtype == example["crop_top_left"].dtype == torch.int64


def test_original_size_is_that_of_the_upright_image(tmp_path: Path, save: Save) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save("a.jpg", Image.new("RGB", (48, 32)), exif=exif)
    example = CaptionedImageFolder(tmp_path, SquareCrop(16), instance_prompt="a TOK")[0]
    assert example["original_size"].tolist() == [48, 32]
    assert example["crop_top_left"].tolist() == [4, 0]


def test_home_folder_is_expanded(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    save("photos/a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(CaptionedImageFolder("~/photos", SquareCrop(8), instance_prompt="a TOK")) == 1


def test_image_that_breaks_during_training_is_named(tmp_path: Path, save: Save) -> None:
    path = save("a.png")
    dataset = CaptionedImageFolder(tmp_path, SquareCrop(8), instance_prompt="a TOK")
    path.unlink()
    with pytest.raises(InputError, match=r"a\.png cannot be read.*No such file"):
        dataset[0]
