"""Trains the VAE of the tiny base: 64 px to latents of 4 x 16 x 16, and back."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from tiny_base_data import BACKGROUNDS, SIDE
from torch import Tensor

from lit_edm.errors import InputError
from lit_edm.files import write_whole
from lit_edm.sdxl.sizes import BaseSize
from lit_edm.sdxl.tiny import make_vae
from lit_edm.seeds import seed_of, seeded

SAVE_EVERY, PSNR_EVERY, JUDGED = 250, 250, 64


@dataclass(frozen=True)
class VAETraining:
    """How the VAE is trained; all that a resumed run has to have alike.

    Args:
        steps: Optimizer steps in all.
        crop_steps: Those at the beginning that see crops of half a side: four times as many for the same work.
        batch_size: Whole images in a step.
        bf16: Whether autocast computes in bf16.
        lr: Learning rate of AdamW, which falls to 0 along half a wave.
        kl_weight: Weight of the latents' divergence from unit noise, a mean as that of the squared error is.
        seed: What weights, batches and noise follow from.
    """

    steps: int = 2000
    crop_steps: int = 1200
    batch_size: int = 8
    bf16: bool = True
    lr: float = 2e-3
    kl_weight: float = 1e-5
    seed: int = 0


class Pictures:
    """Pictures with an alpha channel, which are laid on one of the backgrounds anew each time.

    Args:
        folder: Where they are, and in the folders below it.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.rglob("*.png"))
        if not paths:
            raise InputError(f"{folder} has no pictures: run `tiny_base.py data` first")
        stacked = np.stack([np.array(Image.open(path).convert("RGBA")) for path in paths])
        self.pixels = torch.from_numpy(stacked).permute(0, 3, 1, 2)
        self.grounds = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.pixels)

    def on(self, which: Tensor, backgrounds: Tensor) -> Tensor:
        """Returns pixels (B, 3, H, W) in [-1, 1] of pictures (B,) on backgrounds (B,), by their numbers."""
        chosen = self.pixels[which].float()
        alpha, ground = chosen[:, 3:] / 255, self.grounds[backgrounds][:, :, None, None]
        return (alpha * chosen[:, :3] + (1 - alpha) * ground) / 127.5 - 1

    def batch(self, settings: VAETraining, step: int) -> Tensor:
        """Returns the images of a step, which follow from the seed and its number alone."""
        dice = torch.Generator().manual_seed(seed_of(settings.seed, step))
        crops = step < settings.crop_steps
        count, side = (4 * settings.batch_size, SIDE // 2) if crops else (settings.batch_size, SIDE)
        which = torch.randint(len(self), (count,), generator=dice)
        images = self.on(which, torch.randint(len(self.grounds), (count,), generator=dice))
        corners = torch.randint(SIDE - side + 1, (count, 2), generator=dice).tolist()
        return torch.stack(
            [image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners, strict=True)]
        )

    def judged(self) -> Tensor:
        """Returns images that PSNR is measured on: as many of all pictures, evenly, on all backgrounds in turn."""
        which = torch.linspace(0, len(self) - 1, min(JUDGED, len(self))).long()
        return self.on(which, torch.arange(len(which)) % len(self.grounds))


def train_vae(data: Path, folder: Path, size: BaseSize, settings: VAETraining, minutes: float, device: str) -> bool:
    """Trains, from where an earlier call was, for so many minutes or until all steps are done.

    Args:
        data: Folder of the data step.
        folder: Where state.pt, metrics.jsonl and, in the end, diffusers/ go.
        size: What the network is like.
        settings: How it is trained.
        minutes: How long at most.
        device: Where.

    Returns:
        Whether it is done: only then is there a diffusers/.

    Raises:
        InputError: The folder has a state of other settings.
    """
    end, pictures = monotonic() + 60 * minutes, Pictures(data / "vae")
    with seeded(settings.seed):
        vae = make_vae(size, with_statistics=True).to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    parts = {"vae": vae, "optimizer": optimizer, "schedule": schedule}
    step = resume(folder, parts, settings)
    while step < settings.steps and monotonic() < end:
        images = pictures.batch(settings, step).to(device)
        noise = torch.Generator(device).manual_seed(seed_of(settings.seed, step, 1))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.bf16):
            posterior = DiagonalGaussianDistribution(vae.encode(images).latent_dist.parameters.float())
            decoded = vae.decode(posterior.sample(noise)).sample
        error = (decoded.float() - images).square().mean()
        loss = error + settings.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        if step % PSNR_EVERY == 0 or step == settings.steps:
            note(folder, step=step, error=error.item(), psnr=psnr(vae, pictures.judged().to(device)))
        if step % SAVE_EVERY == 0:
            keep(folder, parts, settings, step)
    keep(folder, parts, settings, step)
    if step < settings.steps:
        return False
    normalise(vae, pictures)
    vae.cpu().eval().save_pretrained(folder / "diffusers")
    return True


def resume(folder: Path, parts: dict[str, Any], settings: VAETraining) -> int:
    """Puts a kept state back, if there is one; returns the steps that were made."""
    if not (folder / "state.pt").exists():
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        return 0
    kept = torch.load(folder / "state.pt", "cpu", weights_only=True)
    if kept["settings"] != asdict(settings):
        raise InputError(f"{folder}/state.pt is of other settings ({kept['settings']}): go on with these, or delete it")
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    return kept["step"]


def keep(folder: Path, parts: dict[str, Any], settings: VAETraining, step: int) -> None:
    """Writes what a later call goes on with."""
    state = {name: part.state_dict() for name, part in parts.items()} | {"settings": asdict(settings), "step": step}
    write_whole(folder / "state.pt", lambda part: torch.save(state, part))


def note(folder: Path, **row: float) -> None:
    """Prints a row of numbers, and adds it to metrics.jsonl."""
    print(", ".join(f"{key} {value:g}" for key, value in row.items()), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


@torch.no_grad()
def psnr(vae: Any, images: Tensor) -> float:
    """Returns the peak signal-to-noise ratio in dB of images (B, 3, H, W) through their mean latents."""
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return (10 * torch.log10(4 / (decoded - images).square().flatten(1).mean(1))).mean().item()


@torch.no_grad()
def normalise(vae: Any, pictures: Pictures) -> None:
    """Writes into a VAE's config the mean and the deviation of each channel of its latents, as Playground v2.5 has."""
    device = next(vae.parameters()).device
    every = torch.arange(len(pictures))
    images = pictures.on(every, every % len(pictures.grounds))
    latents = torch.cat([vae.encode(some.to(device)).latent_dist.mean.cpu() for some in images.split(64)]).double()
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=0.5)
