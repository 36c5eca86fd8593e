"""Captioned images of data sets that the `datasets` library reads: from the Hugging Face Hub, or saved on disk."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lit_edm.data.captions import find_caption_column, listed
from lit_edm.data.folder import CaptionedImage
from lit_edm.data.images import ImageSource
from lit_edm.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

BUILDERS = {".arrow": "arrow", ".parquet": "parquet"}


@dataclass(frozen=True)
class DatasetImage(ImageSource):
    """A picture in a row of a data set, from where it is read each time it is asked for.

    Args:
        column: The data set's column of pictures, undecoded: their bytes, or the paths of their files.
        row: Number of the row, from 0 on.
        place: What messages call the column.
        folders: Where files that rows name have to be; anywhere if not given, for a data set of the user's own.
    """

    column: "Dataset" = field(repr=False)
    row: int
    place: str
    folders: tuple[Path, ...] | None = None

    @property
    def name(self) -> str:
        """The data set, the row and the column."""
        return _row(self.place, self.row)

    def open(self) -> BinaryIO:
        """Opens the bytes in the row, or the file that it names."""
        (value,) = self.column[self.row].values()
        content = value if isinstance(value, dict) else {"path": value}
        if (encoded := content.get("bytes")) is not None:
            return BytesIO(encoded)
        if not content.get("path"):
            raise InputError(f"{self.name} is empty: give every row a picture")
        path = Path(content["path"]).expanduser()
        if self.folders is not None and not any(path.resolve().is_relative_to(folder) for folder in self.folders):
            raise InputError(f"{self.name} is {path}, which did not come with the data set: choose another data set")
        return path.open("rb")


def load_captioned_images(
    name: str,
    config: str | None = None,
    split: str = "train",
    caption_column: str | None = None,
    image_column: str | None = None,
    mask_column: str | None = None,
    instance_prompt: str | None = None,
) -> list[CaptionedImage]:
    """Finds the images of a data set, their captions and their masks. No picture is decoded or kept in memory.

    Args:
        name: Its name on the Hub, or the path of a folder (saved by save_to_disk or not) or of a .parquet or .arrow
            file.
        config: Which of its configurations; only needed if there are several.
        split: Which of its splits.
        caption_column: Column of the captions; found by itself if there is only one.
        image_column: Column of the pictures, or of the paths of their files; image if not given.
        mask_column: Column of the masks, empty for images without one. No column is taken for masks by itself, for
            those of a segmentation are no weights.
        instance_prompt: Caption of images, should there be no column with text at all.

    Returns:
        The captioned images, in the order of the data set.

    Raises:
        InputError: `datasets` is not installed, or there is no such data set, split or column, or a row lacks its image
            or caption.
    """
    dataset, place = _load(name, config, split), f"{name} [{split}]"
    folders = None if Path(name).expanduser().exists() else _caches()
    images = _images(dataset, image_column or "image", "image_column", place, folders)
    masks = _images(dataset, mask_column, "mask_column", place, folders) if mask_column else [None] * len(images)
    captions = _captions(dataset, caption_column, {image_column or "image", mask_column}, instance_prompt, place)
    return [
        CaptionedImage(_required(image, row, place), caption, mask)
        for row, (image, caption, mask) in enumerate(zip(images, captions, masks, strict=True))
    ]


def _load(name: str, config: str | None, split: str) -> "Dataset":
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"data.init_args.dataset is {name}, but `datasets`, which reads it, is not installed: "
            "pip install 'lit-edm[data]'"
        ) from error
    path = Path(name).expanduser()
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # what save_to_disk leaves
        return _pick_split(_blamed(name, lambda: datasets.load_from_disk(path)), name, split)
    if path.is_file():
        if (builder := BUILDERS.get(path.suffix.lower())) is None:
            raise InputError(f"{path} is no data set file ({', '.join(BUILDERS)}): correct data.init_args.dataset")
        return _blamed(name, lambda: datasets.load_dataset(builder, config, data_files=str(path), split=split))
    name = str(path) if path.is_dir() else name
    return _blamed(name, lambda: datasets.load_dataset(name, config, split=split))


def _blamed(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # of a dozen classes: of `datasets`, of the Hub's client, of Arrow, of the network
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{name} cannot be loaded ({why}): correct data.init_args.dataset, .dataset_config or .split"
        ) from error


def _pick_split(loaded: "Dataset | DatasetDict", name: str, split: str) -> "Dataset":
    if isinstance(loaded, dict):
        if split not in loaded:
            raise InputError(
                f"{name} has no split {split!r}, but {', '.join(map(str, loaded))}: correct data.init_args.split"
            )
        return loaded[split]
    if split not in ("train", str(loaded.split)):  # one that was saved without a split is all there is to train on
        raise InputError(f"{name} was saved without splits: leave out data.init_args.split, which is {split!r}")
    return loaded


def _caches() -> tuple[Path, ...]:
    """Returns the folders that files from the Hub are in."""
    from datasets import config

    names = [config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH]
    names += [os.environ["HF_HUB_CACHE"]] if "HF_HUB_CACHE" in os.environ else []
    return tuple(Path(name).expanduser().resolve() for name in names)


def _images(
    dataset: "Dataset", column: str, setting: str, place: str, folders: tuple[Path, ...] | None
) -> list[ImageSource | None]:
    """Returns the picture of each row, None where it is empty."""
    from datasets import Image

    feature = _feature(dataset, column, setting, place)
    alone = dataset.select_columns([column])
    if isinstance(feature, Image):
        alone = alone.cast_column(column, Image(decode=False))
    elif not _is_text(feature) and not (isinstance(feature, dict) and {"bytes", "path"} <= set(feature)):
        raise InputError(f"{place}: {column!r} holds {feature}: name a column of images as data.init_args.{setting}")
    where = f"{place}, column {column!r}"
    rows = enumerate(_there(alone))
    return [DatasetImage(alone, row, where, folders) if is_there else None for row, is_there in rows]


def _there(column: "Dataset") -> Iterator[bool]:
    """Tells for each row of an only column whether something is in it, without reading pictures."""
    tables: Any = column.with_format("arrow").iter(1000)
    for table in tables:
        values = table.column(0)
        yield from map(bool, values.to_pylist()) if _is_text(values.type) else values.is_valid().to_pylist()


def _required(image: ImageSource | None, row: int, place: str) -> ImageSource:
    if image is None:
        raise InputError(f"{_row(place, row)} has no image: give it one or leave the row out")
    return image


def _captions(
    dataset: "Dataset", wanted: str | None, others: set[str | None], instance_prompt: str | None, place: str
) -> list[str]:
    columns = [name for name, feature in dataset.features.items() if name not in others and _is_text(feature)]
    if wanted is None and instance_prompt and not columns:
        return [instance_prompt] * len(dataset)
    column = wanted or find_caption_column(place, columns)
    if not _is_text(feature := _feature(dataset, column, "caption_column", place)):
        raise InputError(f"{place}: {column!r} holds {feature}: name a column of text as data.init_args.caption_column")
    captions = list(dataset.select_columns([column])[column])
    for row, caption in enumerate(captions):
        if not caption or not caption.strip():
            raise InputError(f"{_row(place, row)}: {column!r} is {caption!r}: write some text there")
    return captions


def _feature(dataset: "Dataset", column: str, setting: str, place: str) -> Any:
    if column not in dataset.features:
        there = listed(dataset.features)
        raise InputError(f"{place} has no column {column!r}, but {there}: correct data.init_args.{setting}")
    return dataset.features[column]


def _is_text(feature: Any) -> bool:
    return str(getattr(feature, "dtype", feature)) in ("string", "large_string")  # of `datasets`, or of Arrow


def _row(place: str, row: int) -> str:
    return f"{place}, row {row} (counted from 0)"
