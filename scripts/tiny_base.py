"""Trains the tiny base from nothing, in five steps: `python scripts/tiny_base.py data`, and so on.

    data     fetches icons by npm and pip, splits, renders and captions them; needs `pip install resvg-py`
    vae      trains the VAE: some five minutes on one core; call it again until it is done
    unet     trains UNet and text encoders: twenty minutes on two cores, with --processes 2; goes on where it was
    export   writes the base in diffusers' layout, in half precision, with a model card
    check    draws from it, and measures what it has learned and what fine-tuning teaches it

Each step reads what those before it have left in the folder --work, and can be broken off.
"""

import json
import os
import sys
from pathlib import Path

import torch
from jsonargparse import auto_cli
from tiny_base_check import check_base
from tiny_base_data import ROOT, write_data
from tiny_base_export import export_base
from tiny_base_icons import FluentIcons, fetch, read_merges
from tiny_base_tuning import BASE
from tiny_base_unet import ICONS, BaseTraining, make_start, train_unet
from tiny_base_vae import VAETraining, train_vae

from lit_edm.errors import InputError

WORK = Path("build/tiny-base")


def data(
    work: Path = WORK, sources: Path | None = None, concepts: int = 120, held_out: int = 24, seed: int = 0
) -> None:
    """Fetches icons, settles which are for what, renders and captions them, and cuts CLIP's vocabulary down to that.

    Args:
        work: Folder of all steps.
        sources: Folder that has the packages already, or that they are fetched to; one in the work folder if not given.
        concepts: Things that the base learns to draw, flat and as lines.
        held_out: Things among them that fine-tuning is judged on.
        seed: What all choices follow from.
    """
    sources = sources or work / "sources"
    fetch(sources)
    tuned = ROOT / "data/icons3d/metadata.jsonl"
    chosen = write_data(FluentIcons(sources), read_merges(sources), work / "data", tuned, concepts, held_out, seed)
    print(json.dumps({name: len(things) for name, things in vars(chosen).items()}))


def vae(work: Path = WORK, minutes: float = 30.0, device: str = "cpu", settings: VAETraining = VAETraining()) -> None:
    """Trains the VAE, from where an earlier call was.

    Args:
        work: Folder of all steps.
        minutes: How long at most.
        device: Where, as torch calls it.
        settings: How it is trained.
    """
    done = train_vae(work / "data", work / "vae", ICONS, settings, minutes, device)
    print("done" if done else "not done yet: call again")


def unet(
    work: Path = WORK,
    images: int = 128_000,
    minutes: float = 60.0,
    device: str = "auto",
    processes: int = 1,
    settings: BaseTraining = BaseTraining(),
) -> None:
    """Trains UNet and text encoders, from where an earlier call was.

    Args:
        work: Folder of all steps.
        images: Images to be seen in all.
        minutes: How long at most, this time.
        device: Where, as Lightning calls it: cpu, gpu, auto.
        processes: Processes that share out the images of a step: one for each core, or for each GPU.
        settings: How it is trained.
    """
    start = work / "start"
    if not start.is_dir():
        make_start(work / "data", work / "vae/diffusers", start, ICONS, settings.seed)
    seen = train_unet(work / "data", start, work / "unet", settings, images, minutes, device, processes)
    print(f"{seen} images seen, of {images}")


def export(work: Path = WORK, output: Path = BASE) -> None:
    """Writes the averaged weights as a base in diffusers' layout, with a model card.

    Args:
        work: Folder of all steps.
        output: Folder to write to.
    """
    size = export_base(work, output)
    print(f"{output}: {size / 1e6:.1f} MB of weights")


def check(work: Path = WORK, base: Path = BASE, gates: tuple[str, ...] = ("G1", "G2", "G3"), seeds: int = 3) -> None:
    """Measures the gates, and writes what comes out to the folder check/ in the work folder.

    Args:
        work: Folder of all steps.
        base: The exported base.
        gates: Which of G1, G2, G3 and G4, which is G3 for several ways of training.
        seeds: Fine-tuning runs of each way.
    """
    check_base(work / "data", base, work / "check", gates, seeds)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)  # such small networks do not share out well
    try:
        auto_cli([data, vae, unet, export, check])
    except InputError as error:
        sys.exit(f"tiny_base.py: error: {error}")
