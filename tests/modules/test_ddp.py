"""Two processes train one module as one process does with batches of twice the size, whatever makes steps differ."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from lit_edm.cache import DiskCache, MemoryCache, TensorCache
from lit_edm.callbacks import ExponentialMovingAverage, FreezeEmbeddings, TrainDuring, ValidationImages
from lit_edm.data import AspectBuckets, CaptionedImagesDataModule, ClassImages, TeacherPrior
from lit_edm.edm import (
    AdaptiveNoise,
    EDMLoss,
    EulerSampler,
    MinSNRWeighting,
    SNRWeighting,
    Stratified,
    UniformTimesteps,
)
from lit_edm.modules import SDXLModule
from lit_edm.optim import GroupedProdigy
from lit_edm.sdxl import LoRA


class EqualOnBoth(Callback):
    """Fails where the processes' trained values differ, which plain DDP never notices."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: SDXLModule, outputs: Any, *_: Any) -> None:
        mine = torch.cat([p.detach().flatten() for p in pl_module.parameters() if p.requires_grad])
        every: Any = trainer.strategy.all_gather(mine)
        assert torch.isfinite(mine).all()
        assert every[0].equal(every[1]), f"the processes differ after batch {trainer.global_step}"
        assert torch.isfinite(outputs["loss"])

    def on_train_end(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        if trainer.is_global_zero:  # the processes are not this one
            Path(trainer.default_root_dir, "steps").write_text(str(trainer.global_step))


def data_of(images: Path, prior: str, cache: TensorCache | None, **settings: Any) -> CaptionedImagesDataModule:
    priors = {
        "folder": ClassImages(root=str(images / "class"), prompt="an icon"),
        "teacher": TeacherPrior("an icon"),
    }
    return CaptionedImagesDataModule(
        str(images / "instance"),
        resolution=16,
        buckets=AspectBuckets(step=4),
        instance_prompt="an icon of TOK",
        prior=priors[prior],
        latent_cache=cache,
        random_flip=True,
        **settings,
    )


def phases() -> list[Callback]:
    return [FreezeEmbeddings(0.5), TrainDuring("text_encoders", stop=0.5), TrainDuring("unet", start=0.25)]


def module_of(tiny: Path, text_cache: TensorCache | None, **settings: Any) -> SDXLModule:
    torch.manual_seed(0)
    adapters = {"adapter": LoRA(rank=2), "text_encoder_adapter": LoRA(rank=2)}
    return SDXLModule(str(tiny), tokens={"TOK": 2}, text_cache=text_cache, **adapters, **settings)


@pytest.mark.parametrize(("prior", "cache"), [("folder", "disk"), ("teacher", "memory")])
def test_two_processes_stay_one_model(tiny: Path, images: Path, trainer: Any, prior: str, cache: str) -> None:
    texts, latents = (DiskCache(str(images / n)) if cache == "disk" else MemoryCache() for n in ("texts", "latents"))
    module = module_of(tiny, texts, optimizer=lambda groups: GroupedProdigy(groups, d0=1e-3))
    callbacks = [*phases(), EqualOnBoth()]
    run = trainer(*callbacks, max_steps=8, strategy="ddp_fork", devices=2, gradient_clip_val=1.0)
    run.fit(module, data_of(images, prior, latents, batch_size=2))
    assert (images / "steps").read_text() == "8"


def loss_of(law: str) -> EDMLoss:
    match law:
        case "timesteps":
            weighting = MinSNRWeighting(sigma_data=1.0)
            return EDMLoss(UniformTimesteps(), weighting, noise_offset=0.1, input_perturbation=0.1)
        case "stratified":
            return EDMLoss(Stratified(UniformTimesteps()), SNRWeighting())
        case _:
            return EDMLoss(AdaptiveNoise(UniformTimesteps(), num_bins=10), SNRWeighting())


@pytest.mark.parametrize(
    ("prior", "cache", "law", "accumulate"),
    [("folder", True, "timesteps", 2), ("teacher", False, "stratified", 1), ("teacher", True, "adaptive", 1)],
)
def test_two_processes_are_one_with_twice_the_batch(
    tiny: Path, images: Path, trainer: Any, prior: str, cache: bool, law: str, accumulate: int
) -> None:
    """Weights, averages, losses and pictures; through the pivot; in one go, and resumed in mid-epoch on two or one."""

    def train(name: str, processes: int, ckpt_path: Path | None = None) -> dict[str, Any]:
        seed_everything(3, verbose=False)
        folder = images / name
        pictures = ValidationImages(["TOK"], every_n_steps=3, resolution=16, sampler=EulerSampler(2))
        ema = ExponentialMovingAverage(half_life=20, rampup_ratio=None)
        keep = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, save_last=True)
        several: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2} if processes > 1 else {}
        run = trainer(
            *phases(),
            ema,
            pictures,
            keep,
            max_steps=6,
            enable_checkpointing=True,
            log_every_n_steps=1,
            gradient_clip_val=1.0,
            accumulate_grad_batches=accumulate,
            logger=CSVLogger(folder, name="", version=""),
            **several,
        )
        caches = [DiskCache(str(images / "texts")), DiskCache(str(images / "latents"))] if cache else [None, None]
        module = module_of(
            tiny, caches[0], loss=loss_of(law), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4)
        )
        run.fit(module, data_of(images, prior, caches[1], batch_size=4 // processes), ckpt_path=ckpt_path)
        with (folder / "metrics.csv").open() as file:
            losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
        picture = np.asarray(Image.open(folder / "images" / "step_000006" / "00.png"))
        return {**torch.load(folder / "last.ckpt", weights_only=True), "losses": losses, "picture": picture}

    one, two = train("one", 1), train("two", 2)
    middle = next((images / "two").glob("*step=4.ckpt"))
    resumed, elsewhere = train("resumed", 2, middle), train("elsewhere", 1, middle)
    assert len(one["losses"]) == 6
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-4)
    assert elsewhere["losses"] == pytest.approx(one["losses"][4:], rel=1e-4)
    for several in (two, resumed, elsewhere):
        for name, value in one["state_dict"].items():
            torch.testing.assert_close(several["state_dict"][name], value, rtol=1e-3, atol=1e-5, msg=name)
        averages = (run["callbacks"]["ExponentialMovingAverage"] for run in (one, several))
        torch.testing.assert_close(*averages, rtol=1e-3, atol=1e-5)
        assert np.abs(one["picture"].astype(int) - several["picture"]).max() <= 1
    assert resumed["losses"] == two["losses"][4:]
    for name, value in two["state_dict"].items():
        assert resumed["state_dict"][name].equal(value), name
