from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lit_edm.callbacks.run_settings import described, described_adapter, run_settings
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.edm import EDMLoss, LearnedWeighting, LogNormal, MinSNRWeighting, UniformTimesteps
from lit_edm.modules import SDXLModule
from lit_edm.sdxl import DoRA, FullFinetune, LoRA


def test_what_a_run_did(tiny: Path, icons: Path, trainer: Callable[..., Trainer]) -> None:
    module = SDXLModule(
        str(tiny),
        tokens={"TOK": 2, "HAT": 1},
        initializers={"HAT": "hat"},
        adapter=LoRA(rank=2, alpha=4.0),
        loss=EDMLoss(UniformTimesteps(), MinSNRWeighting(gamma=5.0, sigma_data=1.0)),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.5),
        embeddings_lr=1e-3,
    )
    images = CaptionedImagesDataModule(icons, resolution=16, batch_size=3, caption_prefix="TOK HAT ")
    training = trainer(max_steps=2, accumulate_grad_batches=2)
    training.fit(module, images)
    assert run_settings(training, module) == {
        "UNet": "LoRA(rank=2, alpha=4.0)",
        "new tokens": "TOK = <s0><s1>, HAT = <s2>",
        "loss": "EDMLoss()",
        "noise": "UniformTimesteps()",
        "weighting": "MinSNRWeighting(gamma=5.0, sigma_data=1.0)",
        "optimizer": "AdamW(lr=0.0001, 0.001)",
        "learning rate schedule": "LinearLR",
        "optimizer steps": "2",
        "images in a step": "6 (3 a batch x 2 batches)",
        "resolution": "16 px",
        "precision": "32-true",
    }


@dataclass(frozen=True)
class Part:
    path: str
    off: float = 0.0
    flag: bool = True


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (None, ""),
        (LogNormal(), "LogNormal(p_mean=-1.2, p_std=1.2)"),
        (LogNormal(p_mean=0.0), "LogNormal(p_mean=0.0, p_std=1.2)"),
        (EDMLoss(noise_offset=0.1), "EDMLoss(noise_offset=0.1)"),
        (LearnedWeighting(), "LearnedWeighting()"),
        (Part("x"), "Part(path='x')"),
        (Part("x", flag=False), "Part(path='x', flag=False)"),
        (FullFinetune(("mid_block",)), "FullFinetune(blocks=('mid_block',))"),
    ],
    ids=str,
)
def test_parts_in_words(part: Any, words: str) -> None:
    assert described(part) == words


def test_an_alpha_is_always_told() -> None:
    assert described_adapter(DoRA(rank=3)) == "DoRA(rank=3, alpha=rank)"
    assert described_adapter(LoRA(rank=3, ranks={"mid_block": 4})) == "LoRA(rank=3, ranks={'mid_block': 4}, alpha=rank)"
    assert described_adapter(FullFinetune()) == "FullFinetune()"
