"""Batches of cached latents are those of pixels, whatever else a run does. Pitfall 2."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from lit_edm.batch import Batch, ClassImageRequest
from lit_edm.cache import DiskCache, MemoryCache, TensorCache
from lit_edm.data import AspectBuckets, CaptionedImagesDataModule, ClassImages, TeacherPrior
from lit_edm.data.team import Team
from lit_edm.errors import InputError

Make = Callable[..., Any]
Save = Callable[..., Path]
COUNT = 7


def encode(pixels: Tensor) -> Tensor:
    """Stands for the VAE: mean colours, eight times smaller."""
    return avg_pool2d(pixels, 8)


def colour_of(number: int) -> tuple[int, int, int]:
    return 30 * number, 255 - 30 * number, 40


@pytest.fixture
def tagged(tmp_path: Path, save: Save) -> Path:
    """Images of one colour each, which their captions number; wide ones, tall ones and a square one."""
    for number in range(COUNT):
        shape = [(64, 32), (32, 64), (40, 40)][number % 3] if number else (40, 40)
        save(f"tagged/{number}.png", Image.new("RGB", shape, colour_of(number)))
        (tmp_path / "tagged" / f"{number}.txt").write_text(f"{number}, a tag")
    return tmp_path / "tagged"


class Tagger(LightningModule):
    """Fills the cache as training modules do, notes what belongs together, and learns the mean colour."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.encoded, self.seen = folder, 0, []
        self.colour = torch.nn.Parameter(torch.zeros(3))

    def on_fit_start(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        data.render_missing(self.render)
        self.is_filled = data.fill_cache(self.encode, "vae")

    def render(self, requests: list[ClassImageRequest]) -> Tensor:
        return torch.full((len(requests), 3, *requests[0]["size"]), 1.0)

    def encode(self, pixels: Tensor) -> Tensor:
        self.encoded += 1
        return encode(pixels)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert ("moments" in batch) == self.is_filled
        assert ("image" in batch) != self.is_filled
        colours = (batch["moments"] if self.is_filled else batch["image"]).mean((2, 3))
        for row, caption in enumerate(batch["caption"]):
            levels = ((colours[row] + 1) * 127.5).round().int().tolist()
            weight, original = float(batch["weight"][row]), batch["original_size"][row].tolist()
            self.seen.append((self.current_epoch, caption, levels, weight, original))
        losses = (self.colour - colours).square().mean(1)
        return (losses * batch["weight"]).mean()

    def on_train_end(self) -> None:
        path = self.folder / f"rank_{self.global_rank}.json"
        path.write_text(json.dumps({"encoded": self.encoded, "seen": self.seen, "colour": self.colour.tolist()}))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def check(seen: list[Any]) -> None:
    """Each caption is with its own colour and size."""
    for _, caption, levels, _, original in seen:
        if caption == "a class":
            assert levels == [255, 255, 255]
            continue
        number = int(caption.split(", ")[-2] if caption.endswith("a tag") else caption.split(", ")[-1])
        assert tuple(levels) == colour_of(number)
        assert original == ([40, 40] if number in (0, 2, 5) else [32, 64] if number in (3, 6) else [64, 32])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["none", "memory", "disk"])
@pytest.mark.parametrize("devices", [1, 2])
def test_tagged_images_keep_their_captions(
    tagged: Path, tmp_path: Path, trainer: Make, num_workers: int, kind: str, devices: int
) -> None:
    """Over two shuffled epochs, with repeats, buckets, crops, flips, tags, class images that are rendered and DDP."""
    caches = {"none": None, "memory": MemoryCache(), "disk": DiskCache(str(tmp_path / "cache"))}
    data = CaptionedImagesDataModule(
        tagged,
        resolution=32,
        repeats=3,
        buckets=AspectBuckets(step=8, max_aspect=2),
        random_crop=True,
        random_flip=True,
        shuffle_tags=True,
        batch_size=2,
        num_workers=num_workers,
        prior=ClassImages(str(tmp_path / "classes"), "a class", weight=0.5, num_images=3),
        latent_cache=caches[kind],
        cache_crops=2,
    )
    strategy = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
    trainer(max_steps=-1, max_epochs=2, **strategy).fit(Tagger(tmp_path), data)
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(devices)]
    for epoch in range(2):
        seen = [each for rank in ranks for each in rank["seen"] if each[0] == epoch and each[3] > 0]
        check(seen)
        names = sorted("a class" if each[1] == "a class" else each[1].strip("a tg,") for each in seen)
        assert names == sorted([str(number) for number in range(COUNT)] * 3 + ["a class"] * COUNT * 3)
    assert ranks[0]["seen"][:10] != ranks[0]["seen"][-10:], "shuffled"
    views = 2 * (4 * 2 + 3 + 3)  # flips; two places for what is not square; class images
    encoded = {"none": 0, "memory": views * devices, "disk": views}[kind]
    assert sum(rank["encoded"] for rank in ranks) == encoded


def test_two_processes_train_as_one_does_with_batches_as_large_as_theirs(
    tagged: Path, tmp_path: Path, trainer: Make
) -> None:
    """Also where the last batch of a shape is too small for both, and with class images of another weight."""
    learned = []
    for settings in ({"devices": 1}, {"strategy": "ddp_fork", "devices": 2}):
        data = CaptionedImagesDataModule(
            tagged,
            resolution=32,
            buckets=AspectBuckets(step=8, max_aspect=2),
            batch_size=4 // settings["devices"],
            prior=ClassImages(str(tmp_path / "classes"), "a class", weight=0.3, num_images=2),
        )
        trainer(max_steps=-1, max_epochs=3, **settings).fit(Tagger(tmp_path), data)
        learned.append(json.loads((tmp_path / "rank_0.json").read_text())["colour"])
    assert learned[1] == pytest.approx(learned[0], rel=1e-5)


@pytest.fixture(params=["memory", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> TensorCache:
    return MemoryCache() if request.param == "memory" else DiskCache(str(tmp_path / "cache"))


def set_up(root: Path, **settings: Any) -> CaptionedImagesDataModule:
    data = CaptionedImagesDataModule(root, **{"resolution": 32, "batch_size": 2, **settings})
    data.setup("fit")
    return data


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("more", [{}, {"random_flip": True}, {"random_flip": True, "random_crop": True}])
def test_cached_equals_uncached(
    tagged: Path, save: Save, cache: TensorCache, num_workers: int, more: dict[str, bool]
) -> None:
    """Under one seed, but for the moments in place of pixels: sizes, masks, captions, weights, teacher."""
    for number in range(COUNT):
        shape = Image.open(tagged / f"{number}.png").size
        save(f"tagged/{number}.png", Image.effect_noise(shape, 80).convert("RGB"))
    save("tagged/1.mask.png", Image.linear_gradient("L").resize(Image.open(tagged / "1.png").size))
    settings = {"caption_dropout": 0.3, "buckets": AspectBuckets(8), "prior": TeacherPrior("a class", 0.5)}
    data = set_up(tagged, latent_cache=cache, num_workers=num_workers, **settings, **more)
    uncached = list(data.train_dataloader())
    assert data.fill_cache(encode, "vae")
    cached = list(data.train_dataloader())
    if not more.get("random_crop"):
        uncached = list(set_up(tagged, **settings, **more).train_dataloader())
    assert len(uncached) == len(cached) > 4
    for pixels, moments in zip(uncached, cached, strict=True):
        assert pixels.keys() - {"image"} == moments.keys() - {"moments"}
        torch.testing.assert_close(encode(pixels["image"]), moments["moments"])
        assert moments["moments"].dtype == torch.float32
        for key in ("original_size", "crop_top_left", "weight", "mask"):
            assert pixels[key].equal(moments[key])
        assert pixels["caption"] == moments["caption"]
        assert pixels["teacher"] == moments["teacher"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_image_is_read_once_it_is_cached(tagged: Path, cache: TensorCache, num_workers: int) -> None:
    data = set_up(tagged, latent_cache=cache, num_workers=num_workers)
    data.fill_cache(encode, "vae")
    for path in tagged.glob("*.png"):
        path.unlink()
    assert sum(len(batch["moments"]) for batch in data.train_dataloader()) == COUNT


def test_only_what_changed_is_encoded_in_a_later_run(tagged: Path, tmp_path: Path) -> None:
    def encoded(settings: str = "vae", **more: Any) -> int:
        calls = []
        data = set_up(tagged, latent_cache=DiskCache(str(tmp_path / "cache")), **more)
        data.fill_cache(lambda pixels: calls.append(1) or encode(pixels), settings)
        return len(calls)

    assert encoded() == COUNT
    assert encoded(batch_size=1, repeats=4) == 0
    assert encoded(random_flip=True) == COUNT, "the mirrored ones"
    Image.new("RGB", (40, 40), "white").save(tagged / "0.png")
    (tagged / "1.png").rename(tagged / "renamed.png")
    (tagged / "1.txt").rename(tagged / "renamed.txt")
    assert encoded() == 1
    assert encoded("another vae") == COUNT
    for path in list((tmp_path / "cache").rglob("*.safetensors"))[::3]:
        os.truncate(path, 50)
    assert 0 < encoded() <= COUNT
    assert encoded() == 0


def test_without_a_cache_nothing_is_encoded(tagged: Path) -> None:
    data = set_up(tagged)
    assert not data.fill_cache(lambda pixels: pytest.fail("encoded"), "vae")
    assert "image" in next(iter(data.train_dataloader()))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_cache_that_vanishes_is_named(tagged: Path, tmp_path: Path, num_workers: int) -> None:
    data = set_up(tagged, latent_cache=DiskCache(str(tmp_path / "cache")), num_workers=num_workers)
    data.fill_cache(encode, "vae")
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(InputError, match=r"are gone from data\.init_args\.latent_cache"):
        list(data.train_dataloader())


class TestMemory:
    """Workers have to share the memory of the process that filled it."""

    def test_is_that_of_forked_workers(self, tagged: Path) -> None:
        loader = set_up(tagged, latent_cache=MemoryCache(), num_workers=1).train_dataloader()
        assert loader.multiprocessing_context.get_start_method() == "fork"
        assert set_up(tagged, latent_cache=MemoryCache()).train_dataloader().multiprocessing_context is None
        assert set_up(tagged, num_workers=1).train_dataloader().multiprocessing_context is None

    def test_is_copied_where_there_are_none(
        self, tagged: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("lit_edm.data.loading.get_all_start_methods", lambda: ["spawn"])
        data = set_up(tagged, latent_cache=MemoryCache(), num_workers=2)
        assert data.train_dataloader().multiprocessing_context is None
        assert "each of the 2 processes that load images gets its own copy of the MemoryCache" in caplog.text


def test_machines_without_a_common_folder_encode_for_themselves(
    tagged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others were to encode is still missing after they have."""
    data = set_up(tagged, latent_cache=DiskCache(str(tmp_path / "cache")))
    monkeypatch.setattr(Team, "share", lambda _, work, title: work[::2])
    data.fill_cache(encode, "vae")
    assert sum(len(batch["moments"]) for batch in data.train_dataloader()) == COUNT
