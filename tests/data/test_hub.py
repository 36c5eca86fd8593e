import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from PIL import Image

from lit_edm.data.hub import load_captioned_images
from lit_edm.data.images import check_images, read_mask
from lit_edm.errors import InputError

Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is downloaded, and nothing is left in the user's cache."""
    for constants in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def make(save: Save) -> Callable[..., Any]:
    """Makes a data set of a red and a blue picture, with columns that are added or put in place of others."""

    def make(**columns: Any) -> Any:
        pictures = [save(f"{color}.png", Image.new("RGB", (12, 8), color)) for color in ("red", "blue")]
        usual = {"image": [str(path) for path in pictures], "text": ["a red TOK ", "a blue TOK"]}
        dataset = datasets.Dataset.from_dict(usual | columns)
        is_path = isinstance(dataset[0]["image"], str)
        return dataset.cast_column("image", datasets.Image()) if is_path else dataset

    return make


def _colors(images: list[Any]) -> list[tuple[int, ...]]:
    return [image.image.read().getpixel((0, 0)) for image in images]


RED_AND_BLUE = [(255, 0, 0), (0, 0, 255)]


@pytest.fixture
def kept_as(tmp_path: Path, make: Callable[..., Any]) -> Callable[[str], str]:
    """Writes the data set in one of the ways that it may be kept in."""

    def keep(way: str) -> str:
        if way == "saved":
            make().save_to_disk(tmp_path / "saved")
        elif way == "saved splits":
            datasets.DatasetDict(train=make(), test=make().select([0])).save_to_disk(tmp_path / way)
        elif way == "folder of parquet files":
            make().to_parquet(tmp_path / way / "train-0.parquet")
        elif way == "file.parquet":
            make().to_parquet(tmp_path / way)
        elif way == "file.arrow":
            make().save_to_disk(tmp_path / "saved")
            next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / way)
        else:
            make()  # leaves its pictures
            (tmp_path / way).mkdir()
            for name in ("red", "blue"):
                (tmp_path / f"{name}.png").rename(tmp_path / way / f"{name}.png")
            rows = [
                {"file_name": f"{name}.png", "text": f"a {name} TOK{end}"} for name, end in (("red", " "), ("blue", ""))
            ]
            (tmp_path / way / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / way)

    return keep


@pytest.mark.parametrize(
    "way", ["saved", "saved splits", "folder of parquet files", "file.parquet", "file.arrow", "folder of images"]
)
def test_however_it_is_kept(kept_as: Callable[[str], str], way: str) -> None:
    images = sorted(load_captioned_images(kept_as(way)), key=lambda image: -len(image.caption.strip()))
    assert [image.caption for image in images] == ["a blue TOK", "a red TOK "]
    assert _colors(images) == RED_AND_BLUE[::-1]
    assert [image.image.size() for image in images] == [(8, 12)] * 2
    check_images(images)


def test_split(kept_as: Callable[[str], str]) -> None:
    assert len(load_captioned_images(kept_as("saved splits"), split="test")) == 1
    assert len(load_captioned_images(kept_as("file.parquet"), split="train[:50%]")) == 1


def test_home_folder_is_expanded(
    kept_as: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_as("saved")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_captioned_images("~/saved")) == 2


def test_pictures_are_those_of_the_bytes(tmp_path: Path, save: Save, make: Callable[..., Any]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save("turned.jpg", Image.new("RGB", (48, 32), "red"), exif=exif)
    make(image=[str(path)] * 2).save_to_disk(tmp_path / "saved")
    content = path.read_bytes()
    path.unlink()
    image = load_captioned_images(str(tmp_path / "saved"))[1].image
    assert image.size() == (48, 32)
    assert image.read().size == (32, 48)
    path.write_bytes(content)
    assert image.digest() == load_captioned_images(str(tmp_path / "saved"))[0].image.digest()


def test_goes_to_workers_without_pictures(tmp_path: Path, make: Callable[..., Any]) -> None:
    make().save_to_disk(tmp_path / "saved")
    images = load_captioned_images(str(tmp_path / "saved"))
    packed = pickle.dumps(images)
    assert b"PNG" not in packed
    assert _colors(pickle.loads(packed)) == RED_AND_BLUE
    assert len({image.image for image in images}) == 2  # keys of dictionaries


@pytest.mark.parametrize("as_bytes", [False, True])
def test_other_types_of_columns(tmp_path: Path, save: Save, as_bytes: bool) -> None:
    path = save("a.png")
    image = {"bytes": path.read_bytes(), "path": None} if as_bytes else str(path)
    datasets.Dataset.from_dict({"photo": [image], "title": ["x"], "n": [3]}).save_to_disk(tmp_path / "saved")
    images = load_captioned_images(str(tmp_path / "saved"), image_column="photo")
    assert (images[0].caption, _colors(images)) == ("x", [(255, 0, 0)])


@pytest.mark.parametrize("cast", [False, True])
def test_masks(tmp_path: Path, save: Save, make: Callable[..., Any], cast: bool) -> None:
    mask = str(save("mask.png", Image.new("L", (12, 8), 51)))
    dataset = make(mask=[mask, None if cast else ""], more=["x", "y"])
    if cast:
        dataset = dataset.cast_column("mask", datasets.Image())
    dataset.save_to_disk(tmp_path / "saved")
    name = str(tmp_path / "saved")
    first, second = load_captioned_images(name, mask_column="mask", caption_column="more")
    assert first.mask is not None
    assert read_mask(first.mask).getpixel((0, 0)) == 51
    assert second.mask is None
    assert [image.mask for image in load_captioned_images(name, caption_column="text")] == [None, None]


def test_prompt_where_no_column_has_text(tmp_path: Path, make: Callable[..., Any]) -> None:
    make().remove_columns("text").save_to_disk(tmp_path / "saved")
    images = load_captioned_images(str(tmp_path / "saved"), instance_prompt="a TOK")
    assert [image.caption for image in images] == ["a TOK", "a TOK"]
    with pytest.raises(InputError, match=r"cannot tell which column holds the captions, .*\(none\)"):
        load_captioned_images(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({}, {"split": "test"}, r"was saved without splits: leave out data\.init_args\.split, which is 'test'"),
        ({}, {"image_column": "photo"}, r"no column 'photo', but image, text: correct data\.init_args\.image_column"),
        ({}, {"caption_column": "title"}, r"no column 'title', but image, text: .*data\.init_args\.caption_column"),
        ({}, {"mask_column": "mask"}, r"no column 'mask', but image, text: correct data\.init_args\.mask_column"),
        (
            {"n": [1, 2]},
            {"caption_column": "n"},
            r"'n' holds .*int64.*: name a column of text as data\.init_args\.capt",
        ),
        (
            {"n": [1, 2]},
            {"image_column": "n"},
            r"'n' holds .*int64.*: name a column of images as data\.init_args\.image",
        ),
        ({"title": ["x", "y"], "text": [1, 2], "kind": ["v", "w"]}, {}, r"\(title, kind\).*caption_column"),
        ({"text": ["x", " "]}, {}, r"row 1 \(counted from 0\): 'text' is ' ': write some text there"),
        ({"text": ["x", None]}, {}, "row 1 .*: 'text' is None"),
    ],
)
def test_wrong_columns(
    tmp_path: Path, make: Callable[..., Any], columns: dict[str, Any], settings: dict[str, str], message: str
) -> None:
    make(**columns).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=rf"saved.*{message}") as error:
        load_captioned_images(str(tmp_path / "saved"), **settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_row_without_an_image(tmp_path: Path, make: Callable[..., Any]) -> None:
    make().cast_column("image", datasets.Image(decode=False)).map(
        lambda row, number: {"image": None} if number else row, with_indices=True
    ).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"saved \[train\], row 1 \(counted from 0\) has no image"):
        load_captioned_images(str(tmp_path / "saved"))


def test_broken_image_is_named(tmp_path: Path, make: Callable[..., Any]) -> None:
    broken = [{"bytes": b"none", "path": None}, {"bytes": None, "path": None}]
    make(image=broken).save_to_disk(tmp_path / "saved")
    first, second = load_captioned_images(str(tmp_path / "saved"))
    with pytest.raises(InputError, match=r"saved \[train\], column 'image', row 0 \(counted from 0\) cannot be read"):
        first.check()
    with pytest.raises(
        InputError, match=r"column 'image', row 1 \(counted from 0\) is empty: give every row a picture"
    ):
        second.check()


def test_wrong_split(kept_as: Callable[[str], str]) -> None:
    with pytest.raises(InputError, match=r"saved splits has no split 'val', but train, test: .*data\.init_args\.split"):
        load_captioned_images(kept_as("saved splits"), split="val")
    with pytest.raises(InputError, match=r"file\.parquet cannot be loaded \(.*\['train'\].*data\.init_args\.dataset"):
        load_captioned_images(kept_as("file.parquet"), split="val")


@pytest.mark.parametrize("name", ["nobody/nothing", "/nowhere/at/all"])
def test_unknown_data_set(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} cannot be loaded \(.*\): correct data\.init_args\.dataset") as error:
        load_captioned_images(name)
    assert "\n" not in str(error.value)


def test_file_of_another_kind(save: Save) -> None:
    with pytest.raises(InputError, match=r"a\.png is no data set file \(\.arrow, \.parquet\)"):
        load_captioned_images(str(save("a.png")))


def test_unknown_configuration(kept_as: Callable[[str], str]) -> None:
    with pytest.raises(InputError, match=r"cannot be loaded \(.*'large' not found.*\): .*\.dataset_config"):
        load_captioned_images(kept_as("folder of parquet files"), "large")


def test_datasets_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"dataset is nobody/nothing.*not installed: pip install 'lit-edm\[data\]'"):
        load_captioned_images("nobody/nothing")


def test_data_sets_of_the_hub_name_no_files_of_this_computer(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: make())
    stray, _ = load_captioned_images("someone/pictures")
    with pytest.raises(InputError, match=r"row 0 .* is .*red\.png, which did not come with the data set"):
        stray.image.check()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # where the pictures are
    assert _colors(load_captioned_images("someone/pictures")) == RED_AND_BLUE
