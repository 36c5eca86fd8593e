import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.utils.data import RandomSampler, SequentialSampler

from lit_edm.batch import Batch, DescribesImages
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.errors import InputError

Save = Callable[..., Path]
ICONS = Path(__file__).parents[2] / "data" / "icons3d"


@pytest.fixture
def root(tmp_path: Path, save: Save) -> Path:
    """A folder of three images, 48 x 32, each with its caption in a text file."""
    for name in ("one", "two", "three"):
        save(f"{name}.png", Image.new("RGB", (48, 32))).with_suffix(".txt").write_text(name)
    return tmp_path


def _set_up(root: Path | str, **options: object) -> CaptionedImagesDataModule:
    data = CaptionedImagesDataModule(root, **{"resolution": 32, **options})
    data.setup("fit")
    return data


class Recorder(LightningModule):
    """Trains nothing; keeps the captions of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[list[str]] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.epochs[-1] += batch["caption"]

    def configure_optimizers(self) -> None:
        return None


def test_each_image_is_seen_as_often_as_it_is_repeated(root: Path) -> None:
    data, recorder = CaptionedImagesDataModule(root, resolution=32, repeats=4, batch_size=5), Recorder()
    Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(recorder, data)
    first, second = recorder.epochs
    assert Counter(first) == Counter(second) == {"one": 4, "two": 4, "three": 4}
    assert first != second  # shuffled


def test_repeats_cost_no_memory(root: Path) -> None:
    data = _set_up(root, repeats=10**6, batch_size=2)
    assert len(data.train_dataloader()) == 3 * 10**6 // 2
    assert len(data.dataset) == len(data.captions()) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_fulfil_the_contract(root: Path, num_workers: int) -> None:
    loader = _set_up(root, batch_size=2, num_workers=num_workers).train_dataloader()
    batches = list(loader)
    assert [len(batch["caption"]) for batch in batches] == [2, 1]
    for size, batch in zip((2, 1), batches, strict=True):
        assert set(batch) == set(Batch.__annotations__)
        assert (batch["image"].shape, batch["image"].dtype) == ((size, 3, 32, 32), torch.float32)
        assert batch["original_size"].tolist() == [[32, 48]] * size
        assert batch["crop_top_left"].tolist() == [[0, 8]] * size
        assert batch["original_size"].dtype == batch["crop_top_left"].dtype == torch.int64


@pytest.mark.parametrize("num_workers", [0, 2])
def test_crops_are_drawn_anew_each_epoch(root: Path, num_workers: int) -> None:
    loader = _set_up(root, random_crop=True, repeats=8, num_workers=num_workers).train_dataloader()
    first, second = ([int(batch["crop_top_left"][0, 1]) for batch in loader] for _ in range(2))
    assert len(set(first)) > 3
    assert sorted(first) != sorted(second)


def test_options_reach_the_crop(root: Path) -> None:
    crop = _set_up(root, random_crop=True, random_flip=True).dataset.crop
    assert (crop.resolution, crop.random_crop, crop.random_flip) == (32, True, True)


def test_options_reach_the_captions(tmp_path: Path, save: Save) -> None:
    save("a.png")
    assert _set_up(tmp_path, instance_prompt="a TOK").captions() == ["a TOK"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "wrong", "label": "right"}')
    assert _set_up(tmp_path, caption_column="label").captions() == ["right"]


def test_describes_its_images(root: Path) -> None:
    data = _set_up(root, repeats=3)
    assert isinstance(data, DescribesImages)
    assert data.resolution == 32
    assert data.captions() == ["one", "three", "two"]


def test_loader_shuffles_keeps_workers_and_pins_for_cuda_only(root: Path) -> None:
    loader = _set_up(root, num_workers=2).train_dataloader()
    assert isinstance(loader.sampler, RandomSampler)
    assert (loader.persistent_workers, loader.drop_last) == (True, False)
    assert loader.pin_memory == torch.cuda.is_available()
    assert not _set_up(root).train_dataloader().persistent_workers


def test_real_icons() -> None:
    data = _set_up(ICONS, resolution=64, batch_size=22)
    batch = next(iter(data.train_dataloader()))
    assert len(data.captions()) == len(set(data.captions())) == 22
    assert all(caption.startswith("a 3d icon in the style of TOK, ") for caption in data.captions())
    assert Counter(batch["caption"]) == Counter(data.captions())
    assert batch["image"].shape == (22, 3, 64, 64)
    assert -1 <= batch["image"].min() < -0.5 < 0.5 < batch["image"].max() <= 1
    assert batch["original_size"].unique().tolist() == [256]


@pytest.mark.parametrize("key", ["resolution", "repeats", "batch_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one(root: Path, key: str, value: int) -> None:
    with pytest.raises(InputError, match=rf"data\.init_args\.{key} is {value}: give at least 1"):
        _set_up(root, **{key: value})


def test_negative_number_of_workers(root: Path) -> None:
    with pytest.raises(InputError, match=r"data\.init_args\.num_workers is -1: give at least 0"):
        _set_up(root, num_workers=-1)


def test_broken_image_is_found_before_training(root: Path) -> None:
    path = root / "two.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"two\.png cannot be read"):
        _set_up(root)


def test_image_that_breaks_later_is_named(root: Path) -> None:
    loader = _set_up(root).train_dataloader()
    (root / "two.png").unlink()
    with pytest.raises(InputError, match=r"two\.png cannot be read"):
        list(loader)


def test_unlisted_broken_image_does_no_harm(root: Path) -> None:
    (root / "metadata.jsonl").write_text('{"file_name": "one.png", "text": "uno"}\n')
    (root / "two.png").write_bytes(b"")
    assert _set_up(root).captions() == ["uno"]


class TestHeldOut:
    @pytest.fixture
    def val_root(self, tmp_path: Path, save: Save) -> Path:
        for name in ("four", "five"):
            save(f"../held_out/{name}.png", Image.new("RGB", (48, 32))).with_suffix(".txt").write_text(name)
        return tmp_path.parent / "held_out"

    def test_is_neither_shuffled_nor_changed_at_random(self, root: Path, val_root: Path) -> None:
        data = _set_up(root, val_root=val_root, random_crop=True, random_flip=True, repeats=3, batch_size=2)
        loader = data.val_dataloader()
        assert isinstance(loader.sampler, SequentialSampler)  # type: ignore[union-attr]
        for _ in range(3):
            (batch,) = loader
            assert batch["caption"] == ["five", "four"]
            assert batch["crop_top_left"].tolist() == [[0, 8]] * 2
        assert data.captions() == ["one", "three", "two"], "of what is trained on"
        assert {caption for batch in data.train_dataloader() for caption in batch["caption"]} == {"one", "two", "three"}

    def test_without_one(self, root: Path) -> None:
        assert _set_up(root).val_dataloader() == []

    def test_that_does_not_exist(self, root: Path) -> None:
        with pytest.raises(InputError, match=r"nowhere is no folder: correct data\.init_args\.val_root"):
            _set_up(root, val_root=root / "nowhere")

    def test_with_a_broken_image(self, root: Path, val_root: Path) -> None:
        (val_root / "four.png").write_bytes(b"none")
        with pytest.raises(InputError, match=r"four\.png cannot be read"):
            _set_up(root, val_root=val_root)

    def test_that_is_trained_on_too(self, root: Path, save: Save) -> None:
        save("inner/six.png").with_suffix(".txt").write_text("six")
        with pytest.raises(InputError, match=r"six\.png is trained on too: keep data\.init_args\.val_root outside"):
            _set_up(root, val_root=root / "inner")


def test_every_argument_is_documented() -> None:
    description = CaptionedImagesDataModule.__doc__ or ""
    for name in inspect.signature(CaptionedImagesDataModule).parameters:
        assert f"\n        {name}: " in description
