"""What the tiny base has learned, and what fine-tuning teaches it: the gates, each by figures and by a sheet.

G1  A sheet of 16 flat icons, to be looked at: can one name them?
G2  The true icon that is nearest to a drawn one, in latents: is it that of the prompt?
G3  Does fine-tuning on 22 icons teach their style? On concepts that were never seen in it, what is drawn in the new
    style has to be nearer to the true 3d icon than what could be had for less, and so has the loss on it.
G4  The same figures for other ways of training, which should separate good ones from bad ones.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image
from tiny_base_data import ROOT, SIDE, Split, read_split, slug, thing
from torch import Tensor

from lit_edm.cache import MemoryCache
from lit_edm.callbacks import FreezeEmbeddings
from lit_edm.callbacks.sheet import contact_sheet, to_pictures
from lit_edm.data import CaptionedImagesDataModule, Prior, TeacherPrior
from lit_edm.edm import DiffusionLoss, EDMLoss, EDMWeighting, HeunSampler, LogNormal, SNRWeighting
from lit_edm.files import write_whole
from lit_edm.modules import SDXLModule
from lit_edm.modules.diffusion import evaluating
from lit_edm.modules.prior import blank_batch, unit_noise
from lit_edm.optim import GroupedProdigy
from lit_edm.sdxl import Adapter, LoRA
from lit_edm.seeds import seed_of

SAMPLER = HeunSampler(12)
SIGMAS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Noise levels of validation losses."""
SHOWN = 4
"""Times an epoch of fine-tuning shows each image."""
NAMED = 16
"""Icons of the sheet of G1."""
FLAT, TOK = "{name}, flat icon", "a 3d icon in the style of TOK, {thing}, white background"


@dataclass(frozen=True)
class Judge:
    """Draws with a module, and compares what it draws with true icons.

    Args:
        data: Folder of the data step.
        guidance_scale: Of all drawings.
    """

    data: Path
    guidance_scale: float = 3.0

    @cached_property
    def split(self) -> Split:
        """Which concepts are for what."""
        return read_split(self.data)

    def draw(self, module: SDXLModule, prompts: Sequence[str]) -> Tensor:
        """Returns pixels (B, 3, H, W) of prompts, each from noise of its place among them."""
        drawn = []
        noise = unit_noise(range(len(prompts)), module.latents.shape(SIDE, SIDE), module.device)
        for start in range(0, len(prompts), 32):
            part = prompts[start : start + 32]
            batch = blank_batch(part, (SIDE, SIDE), module.device)
            drawn.append(module.sample(batch, noise[start : start + 32], SAMPLER, self.guidance_scale))
        return torch.cat(drawn).clamp(-1, 1)

    def true(self, style: str, names: Sequence[str]) -> Tensor:
        """Returns the true held-out icons of names in a style, pixels (B, 3, H, W)."""
        return read_pictures([self.data / f"held_out/{style}/{slug(name)}.png" for name in names])

    def flat(self) -> Tensor:
        """Returns the true flat icons of all concepts, on white."""
        return read_pictures([self.data / f"plain/{slug(name)}-flat-white-{SIDE}.png" for name in self.split.concepts])

    @torch.no_grad()
    def loss(self, module: SDXLModule, images: Tensor, prompts: Sequence[str]) -> float:
        """Returns the mean of EDM's loss of images under prompts over SIGMAS, each from noise of its own."""
        latents = latents_of(module, images)
        batch = blank_batch(prompts, (SIDE, SIDE), module.device)
        with evaluating(module):
            denoise = module.denoise(batch)
        weight, losses = EDMWeighting(0.5), list[float]()
        for level, sigma in enumerate(SIGMAS):
            noise = unit_noise([seed_of(level, row) for row in range(len(latents))], latents.shape[1:], module.device)
            sigmas = latents.new_full((len(latents),), sigma)
            error = (denoise(latents + sigma * noise, sigmas) - latents).square().flatten(1).mean(1)
            losses.append((weight(sigmas) * error).mean().item())
        return sum(losses) / len(losses)


def check_base(
    data: Path, base: Path, folder: Path, gates: Sequence[str], seeds: int, guidance_scale: float
) -> dict[str, Any]:
    """Measures gates; writes check.json, check.md and sheets, and returns the figures.

    Args:
        data: Folder of the data step.
        base: The exported base.
        folder: Where to write; what check.json has of other gates is kept.
        gates: Of G1, G2, G3 and G4.
        seeds: Fine-tuning runs of each way of training.
        guidance_scale: Of all drawings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    judge, file = Judge(data, guidance_scale), folder / "check.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if {"G1", "G2"} & set(gates):
        found |= drawn_flat(judge, base, folder)
    if {"G3", "G4"} & set(gates):
        found["tuning"] = {
            name: [tuned(judge, base, folder, name, way, seed) for seed in range(seeds)]
            for name, way in WAYS.items()
            if "G4" in gates or name == GATED
        }
    write_whole(file, lambda part: part.write_text(json.dumps(found, indent=1) + "\n"))
    write_whole(folder / "check.md", lambda part: part.write_text(report(found)))
    return found


def drawn_flat(judge: Judge, base: Path, folder: Path) -> dict[str, Any]:
    """Draws every concept flat, and finds the nearest true icon of each; writes two sheets."""
    module, names = load(base), judge.split.concepts
    images, true = judge.draw(module, [FLAT.format(name=name) for name in names]), judge.flat()
    nearest = nearest_of(latents_of(module, images), latents_of(module, true))
    right = [number == row for row, number in enumerate(nearest)]
    shown = torch.linspace(0, len(names) - 1, min(NAMED, len(names))).long().tolist()
    write_sheet(folder / "G1.png", {f"row {n // 8}": images[shown[n : n + 8]] for n in range(0, len(shown), 8)})
    rows = {"drawn": images, "true": true, "nearest": true[nearest]}
    parts = range(0, len(names), 20)
    write_sheet(folder / "G2.png", {f"{key} {n}": row[n : n + 20] for n in parts for key, row in rows.items()})
    return {
        "named": [names[number] for number in shown],
        "nearest_is_right": sum(right) / len(right),
        "wrong": {names[row]: names[nearest[row]] for row in range(len(names)) if not right[row]},
    }


@dataclass(frozen=True)
class Way:
    """A way of fine-tuning, as configs/quickstart.yaml does but for what is said here.

    Args:
        loss: Scores the denoiser.
        adapter: What is trained beside two new tokens; nothing else if none.
        pivot: Share of the run in which tokens learn.
        epochs: Of 22 images, each shown SHOWN times; 0 trains nothing.
        prior: What keeps flat icons as the base draws them; nothing if none.
    """

    loss: DiffusionLoss = EDMLoss(LogNormal(-0.4, 1.2), EDMWeighting(0.5))
    adapter: Adapter | None = LoRA(rank=8)
    pivot: float = 0.5
    epochs: int = 10
    prior: Prior | None = None


GATED = "EDM-weighted, LoRA and pivot"
WAYS: dict[str, Way] = {
    GATED: Way(),
    "plain eps": Way(EDMLoss(LogNormal(0.483, 1.194), SNRWeighting())),  # noise levels as of uniform timesteps
    "no training": Way(epochs=0),
    "tokens alone": Way(adapter=None, pivot=1.0),
    "no pivot": Way(pivot=1.0),
    "with the base as a teacher": Way(prior=TeacherPrior("a flat icon, white background")),
}


def tuned(judge: Judge, base: Path, folder: Path, name: str, way: Way, seed: int) -> dict[str, float]:
    """Fine-tunes in one way from one seed; returns what G3 compares, and draws a sheet."""
    names, wrong = judge.split.held_out, [*judge.split.held_out[1:], judge.split.held_out[0]]
    prompts = {
        "tok": [TOK.format(thing=thing(one)) for one in names],
        "wrong": [TOK.format(thing=thing(one)) for one in wrong],
        "flat": [FLAT.format(name=one) for one in names],
    }
    seed_everything(seed, verbose=False)
    module = SDXLModule(
        str(base),
        tokens={"TOK": 2},
        adapter=way.adapter,
        loss=way.loss,
        optimizer=partial(
            GroupedProdigy,
            lr=1.0,
            betas=(0.9, 0.99),
            weight_decay=1e-4,
            use_bias_correction=True,
            safeguard_warmup=True,
        ),
        text_cache=MemoryCache(),
    )
    module.configure_model()
    true = judge.true("3d", names)
    before = {
        "flat": judge.draw(module, prompts["flat"]),
        "loss": judge.loss(module, true, [drop(prompt) for prompt in prompts["tok"]]),
    }
    if way.epochs:
        fit(module, way)
    images = {key: judge.draw(module, some) for key, some in prompts.items()}
    mean = read_pictures(sorted((ROOT / "data/icons3d").glob("*.webp"))).mean(0, keepdim=True)
    flat_true = judge.true("flat", names)
    z = partial(latents_of, module)
    write_sheet(
        folder / f"G3-{slug(name).replace(',', '')}-{seed}.png",
        {"TOK": images["tok"], "true 3d": true, "base, flat": before["flat"], "flat, after": images["flat"]},
    )
    return {
        "to true 3d": distance(z(images["tok"]), z(true)),
        "of the base's flat drawing": distance(z(before["flat"]), z(true)),
        "of the mean training image": distance(z(mean).expand(len(names), -1, -1, -1), z(true)),
        "of drawings under a wrong name": distance(z(images["wrong"]), z(true)),
        "loss under TOK": judge.loss(module, true, prompts["tok"]),
        "of the base": before["loss"],
        "under the flat prompt": judge.loss(module, true, prompts["flat"]),
        "under a wrong name": judge.loss(module, true, prompts["wrong"]),
        "flat to true flat, before": distance(z(before["flat"]), z(flat_true)),
        "flat to true flat, after": distance(z(images["flat"]), z(flat_true)),
    }


def fit(module: SDXLModule, way: Way) -> None:
    """Fine-tunes a module on the 22 icons."""
    data = CaptionedImagesDataModule(
        ROOT / "data/icons3d",
        resolution=SIDE,
        repeats=SHOWN,
        prior=way.prior,
        latent_cache=MemoryCache(),
        batch_size=4,
    )
    callbacks: list[Callback] = [FreezeEmbeddings(way.pivot)] if way.pivot < 1 else []
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=way.epochs,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module, data)


def drop(prompt: str) -> str:
    """Returns a prompt of the learned style for a base that does not know it: without the placeholder."""
    return prompt.replace(" in the style of TOK", "")


def load(base: Path) -> SDXLModule:
    """Returns a module that draws as the base does."""
    module = SDXLModule(str(base), adapter=None)
    module.configure_model()
    return module.eval()


def latents_of(module: SDXLModule, images: Tensor) -> Tensor:
    """Returns the mean normalised latents (B, C, h, w) of images (B, 3, H, W)."""
    mean, _ = module.latents.moments(images).chunk(2, dim=1)
    return (mean - module.latents.mean) / module.latents.scale


def nearest_of(some: Tensor, others: Tensor) -> list[int]:
    """Returns which of others is nearest to each of some."""
    return torch.cdist(some.flatten(1), others.flatten(1)).argmin(1).tolist()


def distance(some: Tensor, others: Tensor) -> float:
    """Returns the root of the mean squared difference of each pair, the mean over pairs."""
    return (some - others).square().flatten(1).mean(1).sqrt().mean().item()


def read_pictures(paths: Sequence[Path]) -> Tensor:
    """Returns pictures as pixels (B, 3, SIDE, SIDE) in [-1, 1]."""
    from lit_edm.data.transforms import View, to_tensor

    views = [View((SIDE, SIDE))(to_tensor(Image.open(path).convert("RGB"))) for path in paths]
    return torch.stack(views).float() / 127.5 - 1


def write_sheet(path: Path, rows: Mapping[str, Tensor]) -> None:
    """Writes rows of images, each (B, 3, H, W), at their own size times one and a half."""
    pictures = {title: to_pictures(images) for title, images in rows.items()}
    columns = max(len(row) for row in pictures.values())
    contact_sheet(pictures, [""] * columns, 3 * SIDE // 2).save(path)


def verdicts(figures: Mapping[str, float]) -> dict[str, bool]:
    """Returns which of G3's comparisons hold in a run."""
    distances = ("of the base's flat drawing", "of the mean training image", "of drawings under a wrong name")
    losses = ("of the base", "under the flat prompt", "under a wrong name")
    return {
        **{f"to true 3d < that {name}": figures["to true 3d"] < figures[name] for name in distances},
        **{f"loss under TOK < that {name}": figures["loss under TOK"] < figures[name] for name in losses},
    }


def report(found: Mapping[str, Any]) -> str:
    """Returns the figures as Markdown."""
    lines = ["# What the tiny base has learned", ""]
    if "nearest_is_right" in found:
        lines += [
            f"G1: G1.png shows {', '.join(found['named'])}.",
            "",
            f"G2: the nearest true icon is the right one for {found['nearest_is_right']:.1%} of all concepts.",
            "",
        ]
    if ways := found.get("tuning"):
        keys = list(next(iter(ways.values()))[0])
        lines += ["| " + " | ".join(["way of training", *keys, "G3 holds"]) + " |", "|---" * (len(keys) + 2) + "|"]
        for name, runs in ways.items():
            means = [sum(run[key] for run in runs) / len(runs) for key in keys]
            held = sum(all(verdicts(run).values()) for run in runs)
            lines.append("| " + " | ".join([name, *(f"{x:.3f}" for x in means), f"{held} of {len(runs)}"]) + " |")
    return "\n".join(lines) + "\n"
