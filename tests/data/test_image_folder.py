import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lit_edm.batch import DescribesLabelledImages, LabelledBatch
from lit_edm.data import ImageFolderDataModule
from lit_edm.data.image_folder import find_labelled_images
from lit_edm.errors import InputError

Save = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path, save: Save) -> Path:
    """Six cats, which are red, and four dogs, which are blue; half of an image is black."""
    for name, color, count in (("dogs", "blue", 4), ("cats", "red", 6)):
        for index in range(count):
            picture = Image.new("RGB", (12, 8), color)
            picture.paste("black", (0, 0, 6, 8))
            save(f"{name}/{'deep/' * (index % 2)}{index}.png", picture)
    return tmp_path


def set_up(root: Path, **settings: Any) -> ImageFolderDataModule:
    data = ImageFolderDataModule(root, **({"resolution": 8} | settings))
    data.setup("fit")
    return data


def test_folders_are_the_classes(root: Path) -> None:
    images, names = find_labelled_images(root)
    assert names == ["cats", "dogs"]
    assert {image.path.relative_to(root).parts[0]: image.label for image in images} == {"cats": 0, "dogs": 1}
    assert [image.path for image in images] == sorted(image.path for image in images)


def test_batches_fulfil_the_contract(root: Path) -> None:
    data = set_up(root, held_out=0.3, batch_size=4)
    trained, validated = list(data.train_dataloader()), list(data.val_dataloader())
    assert [len(batch["label"]) for batch in (*trained, *validated)] == [4, 3, 3]
    assert all(set(batch) == set(LabelledBatch.__annotations__) for batch in trained)
    assert [batch["images"] for batch in trained] == [4, 3]
    for batch in (*trained, *validated):
        assert batch["image"].shape[1:] == (3, 8, 8)
        assert batch["label"].dtype == torch.int64
        channel = torch.where(batch["label"] == 0, 0, 2)  # red or blue
        brightest = batch["image"].amax((2, 3))
        assert brightest.argmax(1).equal(channel)
        assert brightest.max() == 1
    assert isinstance(data, DescribesLabelledImages)
    assert data.image_shape == (3, 8, 8)


def test_random_changes_are_for_training_alone(root: Path) -> None:
    data = set_up(root, random_flip=True, held_out=0.5)
    trained = {data.train_set[0]["image"].numpy().tobytes() for _ in range(20)}
    validated = {data.val_set[0]["image"].numpy().tobytes() for _ in range(20)}
    assert (len(trained), len(validated)) == (2, 1)
    assert len({set_up(root, random_crop=True).train_set[0]["image"].numpy().tobytes() for _ in range(20)}) > 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_changes_follow_from_the_epoch_alone(root: Path, num_workers: int) -> None:
    """Neither the state of torch nor workers change them."""

    def epochs(**settings: Any) -> list[torch.Tensor]:
        loader = set_up(root, random_crop=True, random_flip=True, held_out=0, **settings).train_dataloader()
        drawn = []
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            drawn.append(torch.cat([batch["image"] for batch in loader]))
        return drawn

    first = epochs(batch_size=3)
    torch.manual_seed(7)
    again = epochs(batch_size=3, num_workers=num_workers)
    assert all(one.equal(other) for one, other in zip(first, again, strict=True))
    assert not first[0].sort(0).values.equal(first[1].sort(0).values), "drawn anew each epoch"


def test_image_in_no_class(root: Path, save: Save) -> None:
    save("stray.png")
    with pytest.raises(InputError, match=r"stray\.png lies in no class folder: move it to .*some_class"):
        set_up(root)


def test_broken_image_is_found_before_training(root: Path) -> None:
    (root / "cats" / "0.png").write_bytes(b"none")
    with pytest.raises(InputError, match=r"0\.png cannot be read"):
        set_up(root)


def test_every_argument_is_documented() -> None:
    for name in inspect.signature(ImageFolderDataModule).parameters:
        assert f"\n        {name}: " in (ImageFolderDataModule.__doc__ or "")
