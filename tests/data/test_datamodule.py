import inspect
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.utils.data import SequentialSampler

from lit_edm.batch import Batch, CachesLatents, DescribesImages, NeedsPictures
from lit_edm.data import AspectBuckets, CaptionedImagesDataModule, EpochBatches
from lit_edm.errors import InputError

Make = Callable[..., Any]
Save = Callable[..., Path]
ALWAYS = {"image", "caption", "original_size", "crop_top_left", "weight", "images"}


@pytest.fixture
def root(tmp_path: Path, save: Save) -> Path:
    """A folder of three images, 48 x 32, each with its caption in a text file."""
    for name in ("one", "two", "three"):
        save(f"{name}.png", Image.new("RGB", (48, 32))).with_suffix(".txt").write_text(name)
    return tmp_path


def _set_up(root: Path | str | None, **options: Any) -> CaptionedImagesDataModule:
    data = CaptionedImagesDataModule(root, **{"resolution": 32, **options})
    data.setup("fit")
    return data


def _epochs(data: CaptionedImagesDataModule, count: int) -> list[list[Batch]]:
    """Batches of several epochs, as Lightning asks for them."""
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        epochs.append(list(loader))
    return epochs


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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_image_is_seen_as_often_as_it_is_repeated(root: Path, trainer: Make, num_workers: int) -> None:
    data = CaptionedImagesDataModule(root, resolution=32, repeats=4, batch_size=5, num_workers=num_workers)
    recorder = Recorder()
    trainer(max_steps=-1, max_epochs=2).fit(recorder, data)
    first, second = recorder.epochs
    assert Counter(first) == Counter(second) == {"one": 4, "two": 4, "three": 4}
    assert first != second  # shuffled


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_goes_on_with_the_epoch_it_would_have_seen(
    root: Path, trainer: Make, tmp_path: Path, num_workers: int
) -> None:
    """Lightning tells samplers the epoch only after loaders have begun to load its first batches."""

    def run(**settings: Any) -> list[list[str]]:
        data = CaptionedImagesDataModule(root, resolution=32, repeats=3, num_workers=num_workers)
        recorder, keep = Recorder(), ModelCheckpoint(tmp_path / "kept", save_last=True)
        run = trainer(keep, max_steps=-1, max_epochs=3, enable_checkpointing=True)
        run.fit(recorder, data, **settings)
        return recorder.epochs

    whole = run()
    trainer(
        ModelCheckpoint(tmp_path / "two", save_last=True), max_steps=-1, max_epochs=2, enable_checkpointing=True
    ).fit(Recorder(), CaptionedImagesDataModule(root, resolution=32, repeats=3))
    assert run(ckpt_path=tmp_path / "two" / "last.ckpt") == whole[2:]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"batch_size": 3, "num_workers": 1}, "other batch_size over all processes, so"),
        ({"batch_size": 12}, "other batch_size over all processes, so"),
        ({"repeats": 7}, "other images and repeats, so"),
        ({"batch_size": 1, "repeats": 3}, "other batch_size over all processes and images and repeats, so"),
    ],
)
def test_a_run_resumed_with_other_batches_begins_the_epoch_anew(
    root: Path, trainer: Make, tmp_path: Path, changed: dict[str, int], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"resolution": 32, "repeats": 4, "batch_size": 2}
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=4)
    trainer(keep, enable_checkpointing=True).fit(Recorder(), CaptionedImagesDataModule(root, **settings))
    recorder, data = Recorder(), CaptionedImagesDataModule(root, **{**settings, **changed})
    recorder.epochs.append([])  # Lightning does not say that the one goes on in which the run was
    trainer(max_steps=-1, max_epochs=3).fit(recorder, data, ckpt_path=tmp_path / "kept" / "last.ckpt")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"the checkpoint is of a run with {what} that its place in the epoch means nothing here")
    whole = [[caption for batch in epoch for caption in batch["caption"]] for epoch in _epochs(data, 3)]
    assert recorder.epochs[1:] == whole[1:]
    assert recorder.epochs[0] == whole[0][: len(recorder.epochs[0])], "as far as Lightning has it go on"
    assert recorder.epochs[0]


def test_repeats_are_no_longer_lists(root: Path) -> None:
    data = _set_up(root, repeats=10**6, batch_size=2)
    assert len(data.train_dataloader()) == 3 * 10**6 // 2
    assert len(data.train_set) == len(data.captions()) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_fulfil_the_contract(root: Path, num_workers: int) -> None:
    batches = list(_set_up(root, batch_size=2, num_workers=num_workers).train_dataloader())
    assert [len(batch["caption"]) for batch in batches] == [2, 1]
    for size, batch in zip((2, 1), batches, strict=True):
        assert set(batch) == ALWAYS
        assert (batch["image"].shape, batch["image"].dtype) == ((size, 3, 32, 32), torch.float32)
        assert batch["original_size"].tolist() == [[32, 48]] * size
        assert batch["crop_top_left"].tolist() == [[0, 8]] * size
        assert batch["original_size"].dtype == batch["crop_top_left"].dtype == torch.int64
        assert batch["weight"].tolist() == [1] * size


def test_workers_change_nothing(root: Path) -> None:
    settings = {"random_crop": True, "random_flip": True, "caption_dropout": 0.5, "repeats": 5, "batch_size": 2}
    none, some = (_epochs(_set_up(root, num_workers=workers, **settings), 2) for workers in (0, 2))
    for ours, theirs in zip(chain(*none), chain(*some), strict=True):
        assert ours["caption"] == theirs["caption"]
        assert ours["image"].equal(theirs["image"])
        assert ours["crop_top_left"].equal(theirs["crop_top_left"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_crops_and_flips_are_drawn_anew_each_epoch(root: Path, save: Save, num_workers: int) -> None:
    """Pitfall 18."""
    for name in ("one", "two", "three"):
        save(f"{name}.png", Image.linear_gradient("L").resize((48, 32)).rotate(90).convert("RGB"))
    data = _set_up(root, random_crop=True, random_flip=True, repeats=8, num_workers=num_workers)
    first, second = (
        [(int(batch["crop_top_left"][0, 1]), float(batch["image"].mean())) for batch in epoch]
        for epoch in _epochs(data, 2)
    )
    assert len({left for left, _ in first}) > 3
    assert sorted(first) != sorted(second)


def test_options_reach_the_captions(tmp_path: Path, save: Save) -> None:
    save("a.png")
    assert _set_up(tmp_path, instance_prompt="a TOK").captions() == ["a TOK"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "wrong", "label": "right, or so"}')
    named = {"caption_column": "label"}
    assert _set_up(tmp_path, **named).captions() == ["right, or so"]
    assert _set_up(tmp_path, **named, caption_prefix="TOK, ").captions() == ["TOK, right, or so"]
    assert _set_up(tmp_path, **named, caption_dropout=0.1).captions() == ["right, or so", ""]
    assert not _set_up(tmp_path, **named).captions_vary
    shuffled = _set_up(tmp_path, **named, shuffle_tags=True, repeats=20, batch_size=20)
    assert shuffled.captions_vary
    assert set(_epochs(shuffled, 1)[0][0]["caption"]) == {"right, or so", "or so, right"}
    kept = _set_up(tmp_path, **named, shuffle_tags=True, keep_tags=1, repeats=20, batch_size=20)
    assert set(_epochs(kept, 1)[0][0]["caption"]) == {"right, or so"}


def test_captions_are_left_out_as_often_as_asked_for(root: Path) -> None:
    (epoch,) = _epochs(_set_up(root, caption_dropout=0.25, repeats=100, batch_size=300), 1)
    assert 50 < epoch[0]["caption"].count("") < 100


def test_describes_its_images(root: Path) -> None:
    data = _set_up(root, repeats=3)
    assert isinstance(data, DescribesImages)
    assert isinstance(data, NeedsPictures)
    assert isinstance(data, CachesLatents)
    assert data.captions() == ["one", "three", "two"]
    assert data.sizes() == {(32, 32)}


def test_loader_keeps_workers_and_pins_for_cuda_only(root: Path) -> None:
    loader = _set_up(root, num_workers=2).train_dataloader()
    assert isinstance(loader.sampler, EpochBatches)
    assert loader.persistent_workers
    assert loader.pin_memory == torch.cuda.is_available()
    assert not _set_up(root).train_dataloader().persistent_workers


def test_examples_taken_apart_are_refused(root: Path, trainer: Make) -> None:
    with pytest.raises(InputError, match=r"trainer\.overfit_batches would .*: give trainer\.limit_train_batches"):
        trainer(overfit_batches=2).fit(Recorder(), CaptionedImagesDataModule(root, resolution=32))


class TestBuckets:
    @pytest.fixture
    def shapes(self, tmp_path: Path, save: Save) -> Path:
        """Three wide images, two tall ones and a square one."""
        for number, shape in enumerate([(96, 48), (80, 40), (64, 30), (48, 96), (40, 90), (50, 50)]):
            save(f"{number}.png", Image.new("RGB", shape)).with_suffix(".txt").write_text(f"{shape[1]} {shape[0]}")
        return tmp_path

    @pytest.mark.parametrize("batch_size", [1, 2, 4])
    def test_hold_images_of_one_shape_and_every_image_once(self, shapes: Path, batch_size: int) -> None:
        data = _set_up(shapes, buckets=AspectBuckets(step=8, max_aspect=2), batch_size=batch_size)
        for epoch in _epochs(data, 2):
            assert len({caption for batch in epoch for caption in batch["caption"]}) == 6
            assert sum(len(batch["caption"]) for batch in epoch) == 6
            for batch in epoch:
                for caption, original in zip(batch["caption"], batch["original_size"].tolist(), strict=True):
                    height, width = map(int, caption.split())
                    assert original == [height, width]
                    trained = batch["image"].shape[-2:]
                    assert (trained[0] > trained[1]) == (height > width)
        assert data.sizes() == {tuple(batch["image"].shape[-2:]) for batch in data.train_dataloader()}
        assert len(data.sizes()) == 3

    def test_rare_shapes_are_warned_of(self, shapes: Path, caplog: pytest.LogCaptureFixture) -> None:
        buckets = AspectBuckets(step=8, max_aspect=2)
        _set_up(shapes, batch_size=1, buckets=buckets)
        _set_up(shapes, batch_size=2, repeats=2, buckets=buckets)
        _set_up(shapes, batch_size=9)
        assert not caplog.records
        _set_up(shapes, batch_size=3, buckets=buckets)
        (record,) = caplog.records
        assert record.getMessage() == (
            "2 of 3 shapes make no full batch of 3 images in an epoch, the least 1 of 32 x 32 px: their images count "
            "for more; raise data.init_args.buckets.step or lower data.init_args.batch_size"
        )

    def test_cut_little_off(self, shapes: Path) -> None:
        """Where a square would lose half of an image of 2 : 1."""
        (epoch,) = _epochs(_set_up(shapes, buckets=AspectBuckets(step=8, max_aspect=2)), 1)
        wide = next(batch for batch in epoch if batch["caption"] == ["48 96"])
        assert wide["image"].shape[-2:] == (24, 40)
        assert wide["crop_top_left"].tolist() == [[0, 4]]


def test_real_icons(icons: Path) -> None:
    data = _set_up(icons, resolution=64, batch_size=22)
    batch = next(iter(data.train_dataloader()))
    assert len(data.captions()) == len(set(data.captions())) == 22
    assert all(caption.startswith("a 3d icon in the style of TOK, ") for caption in data.captions())
    assert Counter(batch["caption"]) == Counter(data.captions())
    assert batch["image"].shape == (22, 3, 64, 64)
    assert -1 <= batch["image"].min() < -0.5 < 0.5 < batch["image"].max() <= 1
    assert batch["original_size"].unique().tolist() == [256]


@pytest.mark.parametrize("key", ["resolution", "repeats", "batch_size", "cache_crops"])
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


@pytest.mark.parametrize("num_workers", [0, 1])
def test_image_that_breaks_later_is_named(root: Path, num_workers: int) -> None:
    loader = _set_up(root, num_workers=num_workers).train_dataloader()
    (root / "two.png").unlink()
    with pytest.raises(InputError, match=r"two\.png cannot be read"):
        list(loader)


def test_unlisted_broken_image_does_no_harm(root: Path) -> None:
    (root / "metadata.jsonl").write_text('{"file_name": "one.png", "text": "uno"}\n')
    (root / "two.png").write_bytes(b"")
    assert _set_up(root).captions() == ["uno"]


def test_mask_of_another_size_is_found_before_training(root: Path, save: Save) -> None:
    save("two.mask.png", Image.new("L", (48, 31)))
    with pytest.raises(InputError, match=r"two\.mask\.png is 48 x 31 pixels"):
        _set_up(root)


class TestHeldOut:
    @pytest.fixture
    def val_root(self, tmp_path: Path, save: Save) -> Path:
        for name in ("four", "five"):
            save(f"../held_out/{name}.png", Image.new("RGB", (48, 32))).with_suffix(".txt").write_text(name)
        return tmp_path.parent / "held_out"

    def test_is_neither_shuffled_nor_changed_at_random(self, root: Path, val_root: Path) -> None:
        settings = {"random_crop": True, "random_flip": True, "caption_dropout": 0.9, "shuffle_tags": True}
        data = _set_up(root, val_root=val_root, caption_prefix="a ", **settings, repeats=3, batch_size=2)
        loader = data.val_dataloader()
        assert isinstance(loader.sampler, SequentialSampler)  # type: ignore[union-attr]
        for _ in range(3):
            (batch,) = loader
            assert batch["caption"] == ["a five", "a four"]
            assert batch["crop_top_left"].tolist() == [[0, 8]] * 2
        assert data.captions() == ["a one", "", "a three", "a two"], "of what is trained on"

    def test_is_square_beside_buckets(self, root: Path, val_root: Path) -> None:
        data = _set_up(root, val_root=val_root, buckets=AspectBuckets(8))
        assert [tuple(batch["image"].shape[-2:]) for batch in data.val_dataloader()] == [(32, 32)] * 2

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


def test_everything_can_be_written_in_yaml(tmp_path: Path) -> None:
    """And what the run saves of it is the same again."""
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(CaptionedImagesDataModule, "data")
    (tmp_path / "config.yaml").write_text("""
data:
  concepts:
    - root: dogs
      instance_prompt: a TOK dog
      repeats: 4
      prior: {class_path: ClassImages, init_args: {root: other_dogs, prompt: a dog, num_images: 100}}
    - dataset: someone/hats
      split: validation
      prior: {class_path: TeacherPrior, init_args: {prompt: a hat, weight: 0.5}}
  buckets: {max_aspect: 2.0}
  latent_cache: {class_path: lit_edm.cache.DiskCache, init_args: {folder: kept}}
  caption_dropout: 0.1
""")
    config = parser.parse_args(["--config", str(tmp_path / "config.yaml")])
    data = parser.instantiate_classes(config).data
    (tmp_path / "saved.yaml").write_text(parser.dump(config))
    again = parser.instantiate_classes(parser.parse_args(["--config", str(tmp_path / "saved.yaml")])).data
    for built in (data, again):
        assert built.concepts is not None
        assert [str(concept.root or concept.dataset) for concept in built.concepts] == ["dogs", "someone/hats"]
        assert [type(concept.prior).__name__ for concept in built.concepts] == ["ClassImages", "TeacherPrior"]
        assert built.buckets == AspectBuckets(step=64, max_aspect=2.0)
        assert type(built.latent_cache).__name__ == "DiskCache"
