"""Two processes train one module, through the pivot, with everything that makes their steps differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image

from lit_edm.cache import DiskCache, MemoryCache, TensorCache
from lit_edm.callbacks import FreezeEmbeddings, TrainDuring
from lit_edm.data import AspectBuckets, CaptionedImagesDataModule, ClassImages, TeacherPrior
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


@pytest.mark.parametrize(("prior", "cache"), [("folder", "disk"), ("teacher", "memory")])
def test_two_processes_stay_one_model(tiny: Path, tmp_path: Path, trainer: Any, prior: str, cache: str) -> None:
    for folder in ("instance", "class"):
        (tmp_path / folder).mkdir()
        for index, size in enumerate([(24, 16), (16, 16), (16, 20), (32, 16), (16, 30)]):
            Image.effect_noise(size, 40 + index).convert("RGB").save(tmp_path / folder / f"{index}.png")
    caches: list[TensorCache] = [
        DiskCache(str(tmp_path / name)) if cache == "disk" else MemoryCache() for name in ("texts", "latents")
    ]
    data = CaptionedImagesDataModule(
        str(tmp_path / "instance"),
        resolution=16,
        buckets=AspectBuckets(step=4),
        instance_prompt="an icon of TOK",
        prior=ClassImages(root=str(tmp_path / "class"), prompt="an icon")
        if prior == "folder"
        else TeacherPrior("an icon"),
        batch_size=2,
        latent_cache=caches[1],
    )
    module = SDXLModule(
        str(tiny),
        tokens={"TOK": 2},
        adapter=LoRA(rank=2),
        text_encoder_adapter=LoRA(rank=2),
        optimizer=lambda groups: GroupedProdigy(groups, d0=1e-3),
        text_cache=caches[0],
    )
    phases = [FreezeEmbeddings(0.5), TrainDuring("text_encoders", stop=0.5), TrainDuring("unet", start=0.25)]
    run = trainer(*phases, EqualOnBoth(), max_steps=8, strategy="ddp_fork", devices=2, gradient_clip_val=1.0)
    run.fit(module, data)
    assert (tmp_path / "steps").read_text() == "8"
