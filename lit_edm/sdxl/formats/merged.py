"""A whole checkpoint in diffusers' layout: the base with everything in it that an adapter adds."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_edm.errors import InputError
from lit_edm.sdxl.checkpoint import SDXLCheckpoint
from lit_edm.sdxl.formats.whole import own_state
from lit_edm.sdxl.formats.writing import DTYPES, Precision
from lit_edm.sdxl.injection import base_layers, fitting
from lit_edm.sdxl.tokens import Placeholders
from lit_edm.sdxl.updates import NETWORKS, AdapterWeights

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


def write_merged(
    base: SDXLCheckpoint,
    weights: AdapterWeights,
    folder: Path,
    precision: Precision = "float32",
    whole: Mapping[str, nn.Module] | None = None,
    pool_at_end: bool = True,
) -> Path:
    """Writes a checkpoint that StableDiffusionXLPipeline.from_pretrained reads, the updates added and the tokens known.

    New tokens are <s0>, <s1> and so on, in the order of their embeddings.

    Args:
        base: What the adapter belongs to.
        weights: What is merged into it, in float32 before it is rounded.
        folder: Where to write; there must be nothing there.
        precision: Of all weights.
        whole: Networks, by their names in a pipeline, whose own weights have been trained, in place of the base's.
        pool_at_end: With new tokens, let the second encoder pool at the end of text, as SDXLModule does by default.

    Returns:
        The folder, which is there with everything in it or not at all.

    Raises:
        InputError: The folder is not empty, there is no such base, or the adapter is for another one.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: there is something already; name a new folder for the merged checkpoint")
    pipeline = load(base)
    for network, trained in (whole or {}).items():
        getattr(pipeline, network).load_state_dict(own_state(trained))
    bake(weights, {network: getattr(pipeline, network) for network in NETWORKS})
    if weights.embeddings:
        add_tokens_to(pipeline, weights, pool_at_end)
    for part in pipeline.components.values():
        for parameter in part.parameters() if isinstance(part, nn.Module) else ():
            parameter.data = parameter.data.to(DTYPES[precision])
    return save(pipeline, folder)


def load(base: SDXLCheckpoint) -> "StableDiffusionXLPipeline":
    """Loads all parts of a base, float32: those of SDXL, whatever classes its model_index.json names."""
    from diffusers import StableDiffusionXLPipeline

    scheduler = base.load_scheduler()
    base.check_files()
    (tokenizer, tokenizer_2), encoders = base.load_tokenizers(), base.load_text_encoders(torch.float32)
    return StableDiffusionXLPipeline(
        vae=base.load_vae(torch.float32),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=base.load_unet(torch.float32),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=base.zeros_for_empty_prompt(),
    )


@torch.no_grad()
def bake(weights: AdapterWeights, networks: Mapping[str, nn.Module]) -> None:
    """Adds updates to the weights of networks, by their names in a pipeline, in place.

    Raises:
        InputError: A layer is missing, or has another shape; nothing has been added then.
    """
    plans = {name: fitting(updates, networks[name], "the adapter") for name, updates in weights.networks.items()}
    for name, updates in plans.items():
        layers = dict(base_layers(networks[name]).values())
        for layer, update in updates.items():
            weight = layers[layer].weight
            weight += update.delta(weight)


@torch.no_grad()
def add_tokens_to(pipeline: "StableDiffusionXLPipeline", weights: AdapterWeights, pool_at_end: bool) -> None:
    """Gives tokenizers and text encoders the new tokens.

    Raises:
        InputError: The embeddings are those of another base's text encoders.
    """
    names = Placeholders(weights.tokens or {"TOK": len(weights.embeddings["clip_l"])}).names
    for suffix, embeddings in (("", "clip_l"), ("_2", "clip_g")):
        tokenizer, encoder = getattr(pipeline, f"tokenizer{suffix}"), getattr(pipeline, f"text_encoder{suffix}")
        rows: Tensor = weights.embeddings[embeddings]
        wanted = len(names), encoder.config.hidden_size
        if rows.shape != wanted:
            raise InputError(f"the embeddings {embeddings} are {tuple(rows.shape)}, but the base wants {wanted}")
        start = len(tokenizer)
        tokenizer.add_tokens(names)
        encoder.resize_token_embeddings(start + len(names), mean_resizing=False)
        encoder.get_input_embeddings().weight[start:] = rows
        if pool_at_end:  # SDXL's config says 2, which makes CLIP pool at the largest id: a new token's
            encoder.config.eos_token_id = tokenizer.eos_token_id


def save(pipeline: "StableDiffusionXLPipeline", folder: Path) -> Path:
    """Writes a pipeline beside its final place and moves it there."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        pipeline.save_pretrained(part)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
