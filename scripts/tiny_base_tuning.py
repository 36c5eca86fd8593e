"""What fine-tuning as configs/quickstart.yaml does it teaches the tiny base, measured on things it never saw in 3d.

The folder of the base has 24 such things, in 3d and flat. A picture is drawn of each in the learned style, and has to
be nearer to the true 3d icon than what could be had for less; and the loss of the true 3d icons has to be lower.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tiny_base_data import ROOT, SIDE, thing
from torch import Tensor

from lit_edm.callbacks import RunSummary, SaveAdapter
from lit_edm.callbacks.pictures import PictureCallback
from lit_edm.cli import CLI
from lit_edm.data.transforms import View, to_tensor
from lit_edm.edm import EDMLoss, EDMWeighting, HeunSampler
from lit_edm.modules import SDXLModule
from lit_edm.modules.diffusion import evaluating
from lit_edm.modules.prior import blank_batch, unit_noise
from lit_edm.sdxl.denoiser import SDXLDenoiser
from lit_edm.seeds import seed_of

BASE, TUNED = ROOT / "data/tiny-sdxl-icons", ROOT / "data/icons3d"
SAMPLER, GUIDANCE_SCALE = HeunSampler(12), 1.5
SIGMAS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Noise levels of losses."""
FLAT, TOK = "{name}, flat icon", "a 3d icon in the style of TOK, {thing}, white background"

TEACHER = ("--data.prior=TeacherPrior", "--data.prior.prompt=a flat icon, white background", "--data.batch_size=8")
"""Keeps what the base makes of the same images under a flat prompt."""

QUICKSTART = "as the quickstart"
WAYS: dict[str, Sequence[str]] = {
    QUICKSTART: (),
    "plain eps": (  # the noise levels of uniform timesteps, and the mean squared error of the noise
        "--model.loss.noise.p_mean=0.483",
        "--model.loss.noise.p_std=1.194",
        "--model.loss.weighting=SNRWeighting",
    ),
    "no training": ("--trainer.max_epochs=0",),
    "no gradient": (
        "--model.loss=tiny_base_tuning.NoGradient",
        "--model.loss.noise=LogNormal",
        "--model.loss.weighting=EDMWeighting",
        "--model.loss.weighting.sigma_data=0.5",
    ),
    "tokens alone": ("--model.adapter=null", "--trainer.callbacks=[]"),
    "LoRA alone, tokens as they start": ("--model.embeddings_lr=0", "--trainer.callbacks=[]"),
    "no pivot": ("--trainer.callbacks=[]",),
    "with a teacher": TEACHER,
    "no pivot, with a teacher": ("--trainer.callbacks=[]", *TEACHER),
}
"""Ways of fine-tuning, by what they change in the quickstart."""


class NoGradient(EDMLoss):
    """EDM's loss, from which nothing is learned."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the losses (B,), and a gradient of zero."""
        losses = super().__call__(*args, **kwargs)
        return losses.detach() + 0 * losses


@dataclass(frozen=True)
class HeldOut:
    """Things that fine-tuning is judged on.

    Args:
        folder: Has 3d/ and flat/, a picture of each thing.
    """

    folder: Path

    @cached_property
    def names(self) -> list[str]:
        """What the things are called."""
        return [path.stem.replace("-", " ") for path in self._paths("3d")]

    def pictures(self, style: str) -> Tensor:
        """Returns all of them in a style, pixels (B, 3, SIDE, SIDE)."""
        return read_pictures(self._paths(style))

    def prompts(self, template: str, shift: int = 0) -> list[str]:
        """Returns a prompt for each, or for the one that comes so many places after it."""
        shifted = [*self.names[shift:], *self.names[:shift]]
        return [template.format(name=name, thing=thing(name)) for name in shifted]

    def _paths(self, style: str) -> list[Path]:
        return sorted((self.folder / style).glob("*.png"))


def fine_tune(base: Path, seed: int, changes: Sequence[str] = ()) -> tuple[SDXLModule, SDXLModule]:
    """Fine-tunes as the quickstart does, but writes nothing; returns the module before and the module after.

    Args:
        base: Folder of the base.
        seed: Of the run.
        changes: Further options of the command line.
    """
    options = [f"--config={ROOT / 'configs/quickstart.yaml'}", f"--seed_everything={seed}", *changes]
    here = [f"--model.pretrained={base}", f"--data.root={TUNED}", "--data.val_root=null"]
    quiet = ["--trainer.limit_val_batches=0", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    before, after = (CLI(run=False, save_config_callback=None, args=[*options, *here, *quiet]) for _ in range(2))
    trainer, module = after.trainer, after.model
    writers = PictureCallback, SaveAdapter, RunSummary, ModelCheckpoint
    kept = [callback for callback in trainer.callbacks if not isinstance(callback, writers)]  # type: ignore[attr-defined]
    trainer.callbacks = kept  # type: ignore[attr-defined]
    before.model.configure_model()
    trainer.fit(module, after.datamodule)
    module.configure_model()  # a run without steps does not
    return before.model, module


def draw(module: SDXLModule, prompts: Sequence[str]) -> Tensor:
    """Returns pixels (B, 3, SIDE, SIDE) of prompts, each from noise of its place among them."""
    noise = unit_noise(range(len(prompts)), module.latents.shape(SIDE, SIDE), module.device)
    drawn = []
    for start in range(0, len(prompts), 32):
        batch = blank_batch(prompts[start : start + 32], (SIDE, SIDE), module.device)
        drawn.append(module.sample(batch, noise[start : start + 32], SAMPLER, GUIDANCE_SCALE))
    return torch.cat(drawn).clamp(-1, 1)


@torch.no_grad()
def loss(module: SDXLModule, images: Tensor, prompts: Sequence[str]) -> float:
    """Returns the mean of EDM's loss of images under prompts over SIGMAS, each from noise of its own."""
    latents = latents_of(module, images)
    with evaluating(module):
        denoise = module.denoise(blank_batch(prompts, (SIDE, SIDE), module.device))
        weight, losses = EDMWeighting(0.5), list[float]()
        for level, sigma in enumerate(SIGMAS):
            noise = unit_noise([seed_of(level, row) for row in range(len(latents))], latents.shape[1:], module.device)
            sigmas = latents.new_full((len(latents),), sigma)
            error = (denoise(latents + sigma * noise, sigmas) - latents).square().flatten(1).mean(1)
            losses.append((weight(sigmas) * error).mean().item())
    return sum(losses) / len(losses)


def loss_with(module: SDXLModule, denoiser: SDXLDenoiser, images: Tensor, prompts: Sequence[str]) -> float:
    """Returns the loss of a module that has another's denoiser: the new tokens of one, the UNet of the other."""
    own = module.denoiser
    module.denoiser = denoiser
    try:
        return loss(module, images, prompts)
    finally:
        module.denoiser = own


def latents_of(module: SDXLModule, images: Tensor) -> Tensor:
    """Returns the mean normalised latents (B, C, h, w) of images (B, 3, H, W)."""
    mean, _ = module.latents.moments(images).chunk(2, dim=1)
    return (mean - module.latents.mean) / module.latents.scale


def distance(some: Tensor, others: Tensor) -> float:
    """Returns the root of the mean squared difference of each pair, the mean over pairs."""
    return (some - others).square().flatten(1).mean(1).sqrt().mean().item()


def read_pictures(paths: Sequence[Path]) -> Tensor:
    """Returns pictures as pixels (B, 3, SIDE, SIDE) in [-1, 1]."""
    views = [View((SIDE, SIDE))(to_tensor(Image.open(path).convert("RGB"))) for path in paths]
    return torch.stack(views).float() / 127.5 - 1


def drawings(before: SDXLModule, after: SDXLModule, held_out: HeldOut) -> dict[str, Tensor]:
    """Returns what both draw of the held-out things, pixels (B, 3, SIDE, SIDE) each."""
    return {
        "TOK": draw(after, held_out.prompts(TOK)),
        "wrong name": draw(after, held_out.prompts(TOK, shift=1)),
        "flat": draw(after, held_out.prompts(FLAT)),
        "flat, base": draw(before, held_out.prompts(FLAT)),
    }


def figures(before: SDXLModule, after: SDXLModule, held_out: HeldOut, drawn: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns what G3 compares.

    Args:
        before: Draws as the base does; its new tokens have learned nothing.
        after: The fine-tuned module.
        held_out: What is drawn.
        drawn: What `drawings` returns.
    """
    true, true_flat = held_out.pictures("3d"), held_out.pictures("flat")
    rows = [json.loads(line) for line in (TUNED / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    tuned = read_pictures([TUNED / row["file_name"] for row in rows]), [row["prompt"] for row in rows]
    mean = tuned[0].mean(0, keepdim=True).expand(len(true), -1, -1, -1)

    def apart(some: Tensor, others: Tensor) -> float:
        return distance(latents_of(after, some), latents_of(after, others))

    tok, flat, wrong = held_out.prompts(TOK), held_out.prompts(FLAT), held_out.prompts(TOK, shift=1)
    return {
        "TOK to true 3d": apart(drawn["TOK"], true),
        "base's flat to it": apart(drawn["flat, base"], true),
        "mean of the 22 to it": apart(mean, true),
        "wrong name to it": apart(drawn["wrong name"], true),
        "loss under TOK": loss(after, true, tok),
        "base's loss": min(loss(before, true, prompts) for prompts in (tok, flat)),
        "under flat": loss(after, true, flat),
        "under wrong name": loss(after, true, wrong),
        "under untaught tokens": loss_with(before, after.denoiser, true, tok),
        "loss of the 22": loss(after, *tuned),
        "without the adapter": loss_with(after, before.denoiser, *tuned),
        "flat to true flat": apart(drawn["flat"], true_flat),
        "base's flat to true flat": apart(drawn["flat, base"], true_flat),
        "flat drifted": apart(drawn["flat"], drawn["flat, base"]),
    }


def ratios(found: Mapping[str, float]) -> dict[str, float]:
    """Returns each of G3's comparisons as a ratio, which is below 1 where it holds."""
    distances = ("base's flat to it", "mean of the 22 to it", "wrong name to it")
    losses = ("base's loss", "under flat", "under wrong name")
    return {f"TOK / {name}": found["TOK to true 3d"] / found[name] for name in distances} | {
        f"TOK / {name}": found["loss under TOK"] / found[name] for name in losses
    }


def ratios_of_parts(found: Mapping[str, float]) -> dict[str, float]:
    """Returns what each part that learns has to do with it, as ratios that are below 1 where it has learned."""
    return {
        "taught / untaught tokens": found["loss under TOK"] / found["under untaught tokens"],
        "with / without the adapter": found["loss of the 22"] / found["without the adapter"],
    }


MARGINS: Mapping[str, float] = {
    "TOK / base's flat to it": 0.97,
    "TOK / mean of the 22 to it": 0.7,
    "TOK / wrong name to it": 0.6,
    "TOK / base's loss": 0.9,
    "TOK / under flat": 0.9,
    "TOK / under wrong name": 0.6,
    "taught / untaught tokens": 0.9,
    "with / without the adapter": 0.9,
}
"""Ratios that a run of the quickstart stays below, whatever its seed, and one without any of its parts does not."""


def missed(found: Mapping[str, float]) -> list[str]:
    """Returns the comparisons that do not hold by their margins."""
    both = ratios(found) | ratios_of_parts(found)
    return [name for name, most in MARGINS.items() if both[name] >= most]
