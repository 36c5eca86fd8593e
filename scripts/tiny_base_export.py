"""Writes the tiny base as others read it: diffusers' layout, half precision, and a card that says where it is from."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from tiny_base_data import BACKGROUNDS, ORIGINAL_SIDES, SIDE, TEMPLATES, read_split
from tiny_base_icons import PACKAGES, WORDS
from tiny_base_styles import STYLES
from tiny_base_unet import BaseTraining, make_module, write_base
from torch import Tensor

from lit_edm.checkpoints import WholeCheckpointIO
from lit_edm.errors import InputError
from lit_edm.files import write_tensors, write_whole

MOST_BYTES = 16 * 2**20
"""Of all weights: they are kept in the repository."""


def export_base(work: Path, output: Path) -> int:
    """Writes the averaged weights of the last checkpoint, and what fine-tuning is judged on; returns bytes of weights.

    Args:
        work: Folder of all steps.
        output: Folder to write to.

    Raises:
        InputError: There is no checkpoint, or the weights are too large to be kept in the repository.
    """
    checkpoint = work / "unet/checkpoints/last.ckpt"
    if not checkpoint.exists():
        raise InputError(f"there is no {checkpoint}: run `tiny_base.py unet` first")
    kept = WholeCheckpointIO().load_checkpoint(checkpoint)
    average = kept["callbacks"]["ExponentialMovingAverage"]
    write_base(averaged_pipeline(work / "start", average["average"]), output)
    for path in output.rglob("*.json"):
        forget_origin(path)
    files = list(output.rglob("*.safetensors"))
    for path in files:  # and not the networks: their configs would ask for half precision on a CPU, too
        write_tensors(path, {name: value.half() for name, value in load_file(path).items()})
    size = sum(path.stat().st_size for path in files)
    if size > MOST_BYTES:
        raise InputError(f"{output}: the weights have {size} bytes, more than {MOST_BYTES}: make the networks smaller")
    shutil.copytree(work / "data/held_out", output / "held_out", dirs_exist_ok=True)
    write_card(work, output, average["images_seen"], size)
    return size


def forget_origin(path: Path) -> None:
    """Takes the folder that a network was loaded from out of its config, which means nothing on other machines."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:
        write_whole(path, lambda part: part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


def averaged_pipeline(start: Path, average: Mapping[str, Tensor]) -> StableDiffusionXLPipeline:
    """Returns the base that training began with, its weights replaced by their averages."""
    module = make_module(start, BaseTraining())
    module.configure_model()
    module.load_state_dict(dict(average), strict=False)
    networks = module.networks()
    pipeline = StableDiffusionXLPipeline.from_pretrained(start)
    for name, network in networks.items():
        getattr(pipeline, name).load_state_dict(network.state_dict())
    return pipeline


def write_card(work: Path, output: Path, images: int, size: int) -> None:
    """Writes README.md and LICENSE of an exported base."""
    chosen = read_split(work / "data")
    psnr = [json.loads(line) for line in (work / "vae/metrics.jsonl").read_text().splitlines()][-1]["psnr"]
    packages = [*(f"{name} {version}" for name, version in PACKAGES.items()), WORDS.replace("==", " ")]
    examples = [template.format(style="flat", other="flat", name="rocket", thing="a rocket") for template in TEMPLATES]
    card = f"""---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
---
# A tiny SDXL that draws icons

{
        paragraph(f'''
An SDXL of {size / 1e6:.1f} MB: the same classes, conditioning, two text encoders and file layout, with EDM's
preconditioning and normalised latents as Playground v2.5 has them. It draws {len(chosen.concepts)} things as icons of
{SIDE} x {SIDE} pixels, so that a first run and tests can see something learned in a minute on a CPU. It is no use for
anything else.''')
    }

{paragraph(f"Prompts: {'; '.join(examples)}; with ', white background' or without.")}

{paragraph(f"The things: {', '.join(chosen.concepts)}.")}

{
        paragraph(f'''
The styles: {", ".join(STYLES)}, and two at once, as in "dark and soft"; other words in place of a style mean flat.''')
    }

Backgrounds: {", ".join(BACKGROUNDS)}.

## What it has learned from

{
        paragraph(f'''
Microsoft's Fluent Emoji, flat and high contrast ("line"), rendered at {SIDE} and {ORIGINAL_SIDES[1]} px, and the flat
ones recoloured, lit and blurred by rules, which are the other styles; the VAE also from further emoji, in 3D as well.
**Never seen in 3D by anything here**: the things of data/icons3d ({", ".join(chosen.tuned)}), from which fine-tuning
learns, and those that it is judged on, in held_out/ ({", ".join(chosen.held_out)}).''')
    }

{
        paragraph(f'''
Packages: {", ".join(packages)}. The icons are under the MIT licence (LICENSE here), and so are the vocabulary of CLIP,
which is pruned to the words of captions and prompts, emojibase-data, which names the icons, and these weights.''')
    }

## How it was made

{
        paragraph(f'''
{images:,} images through the UNet, {psnr:.1f} dB of the VAE on its own pictures. In this order, each to be called again
until it is done:''')
    }

    python scripts/tiny_base.py data
    python scripts/tiny_base.py vae
    python scripts/tiny_base.py unet --processes 2
    python scripts/tiny_base.py export
    python scripts/tiny_base.py check
"""
    licence = (Path(__file__).parents[1] / "data/icons3d/LICENSE").read_text(encoding="utf-8")
    write_whole(output / "README.md", lambda part: part.write_text(card, encoding="utf-8"))
    write_whole(output / "LICENSE", lambda part: part.write_text(licence, encoding="utf-8"))


def paragraph(text: str) -> str:
    """Returns text in lines of 120 letters at most."""
    return fill(" ".join(text.split()), 120, break_on_hyphens=False)
