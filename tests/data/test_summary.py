from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lit_edm.batch import SummarizesImages
from lit_edm.cache import DiskCache
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.data.buckets import AspectBuckets
from lit_edm.data.concepts import Concept
from lit_edm.data.images import ImageFile
from lit_edm.data.prior import ClassImages, TeacherPrior

WIDE, TALL, SQUARE = (16, 64), (64, 16), (32, 32)


def save(folder: Path, **sizes: tuple[int, int]) -> Path:
    folder.mkdir(parents=True)
    for name, (height, width) in sizes.items():
        Image.new("RGB", (width, height), name).save(folder / f"{name}.png")
    return folder


def set_up(*concepts: Concept, **settings: Any) -> CaptionedImagesDataModule:
    defaults: dict[str, Any] = {"resolution": 32, "buckets": AspectBuckets(step=16)}
    data = CaptionedImagesDataModule(concepts=list(concepts), **(defaults | settings))
    data.setup("fit")
    return data


def moments(image: Tensor) -> Tensor:
    return image[:, :2, ::8, ::8]


def test_what_there_is(tmp_path: Path) -> None:
    mine = save(tmp_path / "mine", red=WIDE, green=SQUARE)
    theirs = save(tmp_path / "theirs", blue=TALL)
    classes = save(tmp_path / "classes", gray=SQUARE)
    concepts = [
        Concept(mine, instance_prompt="TOK", repeats=3, prior=ClassImages(str(classes), "a hat", num_images=3)),
        Concept(theirs, instance_prompt="HAT", prior=TeacherPrior("a hat")),
    ]
    data = set_up(*concepts, val_root=save(tmp_path / "held_out", white=SQUARE))
    assert isinstance(data, SummarizesImages)
    assert data.summary() == {
        "images": 3,
        "prior": 3 + 1,
        "to_render": [(str(classes / f"class_0000{number}.png"), SQUARE) for number in (0, 1)],
        "masks": 0,
        "held_out": 1,
        "examples": 2 * (3 * 2 + 1),
        "sizes": {WIDE: 1, SQUARE: 1 + 3, TALL: 2},
    }


def test_latents_that_a_cache_lacks(tmp_path: Path, monkeypatch: Any) -> None:
    read: list[str] = []
    digest: Callable[[ImageFile], str] = ImageFile.digest
    monkeypatch.setattr(ImageFile, "digest", lambda self: read.append(self.path.name) or digest(self))
    mine = Concept(save(tmp_path / "mine", red=WIDE, green=SQUARE), instance_prompt="TOK")
    cache = DiskCache(str(tmp_path / "latents"))
    data = set_up(mine, latent_cache=cache, random_flip=True)
    assert data.latents_to_keep("a VAE") == {"folder": cache.folder, "kept": 0, "missing": {WIDE: 2, SQUARE: 2}}
    assert data.fill_cache(moments, "a VAE")
    assert sorted(read) == ["green.png", "red.png"], "each is read once"
    assert data.latents_to_keep("a VAE") == {"folder": cache.folder, "kept": 4, "missing": {}}
    assert data.latents_to_keep("another") == {"folder": cache.folder, "kept": 0, "missing": {WIDE: 2, SQUARE: 2}}
    batch = next(iter(data.train_dataloader()))
    assert torch.isfinite(batch["moments"]).all()


def test_class_images_are_counted_before_they_are_rendered(tmp_path: Path) -> None:
    prior = ClassImages(str(tmp_path / "classes"), "a hat", num_images=2)
    mine = Concept(save(tmp_path / "mine", red=SQUARE), instance_prompt="TOK", prior=prior)
    data = set_up(mine, latent_cache=DiskCache(str(tmp_path / "latents")))
    found = data.latents_to_keep("a VAE")
    assert found is not None
    assert found["missing"] == {SQUARE: 3}


def test_without_a_cache(tmp_path: Path) -> None:
    assert set_up(Concept(save(tmp_path / "mine", red=SQUARE), instance_prompt="TOK")).latents_to_keep("a VAE") is None
