"""Finds combinations of base, loss and data that would train silently wrong, before any weight is loaded."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from lit_edm.edm import (
    DiffusionLoss,
    EDMPreconditioning,
    EpsPreconditioning,
    InverseTransform,
    NoiseDistribution,
    Preconditioning,
    VelocityPreconditioning,
)
from lit_edm.errors import InputError
from lit_edm.sdxl.adapters import Adapter, FullFinetune
from lit_edm.sdxl.checkpoint import SDXLCheckpoint
from lit_edm.sdxl.latents import vae_factor

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BUILT_IN = {
    EDMPreconditioning: "EDM-native",
    EpsPreconditioning: "epsilon-predicting",
    VelocityPreconditioning: "v-predicting",
}


def check_preconditioning(given: Preconditioning, base: Preconditioning) -> None:
    """Raises InputError if a preconditioning of this package is given that is not the base's own.

    Classes from elsewhere pass: whoever writes one knows what the base predicts.
    """
    if type(given) in BUILT_IN and given != base:
        raise InputError(
            f"model.init_args.preconditioning is {given}, but the base is {BUILT_IN[type(base)]}: "
            f"its scheduler's config says {base}; remove the line"
        )


def check_loss(loss: DiffusionLoss, base: Preconditioning, sigma_range: tuple[float, float]) -> None:
    """Raises InputError if the loss's noise levels or weights are those of another kind of base.

    Args:
        loss: The objective; parts that lack a property (a user's own) pass its check.
        base: What the UNet predicts.
        sigma_range: Smallest and largest noise level the UNet knows.
    """
    noise, weighting = getattr(loss, "noise", None), getattr(loss, "weighting", None)
    kind = BUILT_IN.get(type(base), type(base).__name__)
    if (sigma_data := getattr(weighting, "sigma_data", base.sigma_data)) != base.sigma_data:
        raise InputError(
            f"model.init_args.loss.init_args.weighting.init_args.sigma_data is {sigma_data}, but the base is {kind} "
            f"with latents of sigma_data {base.sigma_data}: write {base.sigma_data}"
        )
    where = "model.init_args.loss.init_args.noise"
    while isinstance(inner := getattr(noise, "noise", None), NoiseDistribution):  # stratified or adaptive
        noise, where = inner, f"{where}.init_args.noise"
    if (schedule := getattr(noise, "schedule", None)) is not None:
        if isinstance(base, EDMPreconditioning):
            raise InputError(
                f"{where} is {type(noise).__name__}, but the base is EDM-native and has no timesteps; use LogNormal"
            )
        if schedule != getattr(base, "schedule", schedule):
            raise InputError(
                f"{where}.init_args.schedule is {schedule}, but the base has {base}; write the base's values"
            )
    low, high = sigma_range
    sigma_min, sigma_max = range_of(noise, sigma_range)
    if not isinstance(base, EDMPreconditioning) and (sigma_min < low * 0.999 or sigma_max > high * 1.001):
        raise InputError(
            f"{where} draws sigma in [{sigma_min:g}, {sigma_max:g}], but the base is {kind} and knows "
            f"[{low:.4f}, {high:.4f}] alone; write sigma_min: {math.ceil(low * 1e4) / 1e4} and "
            f"sigma_max: {math.floor(high * 1e2) / 1e2}"
        )


def range_of(noise: object, otherwise: tuple[float, float]) -> tuple[float, float]:
    """Returns the smallest and the largest noise level that a law draws, as far as that can be known."""
    if hasattr(noise, "sigma_min") or not isinstance(noise, InverseTransform):
        return getattr(noise, "sigma_min", otherwise[0]), getattr(noise, "sigma_max", otherwise[1])
    low, high = noise.at(torch.tensor([0.0, 1.0], dtype=torch.float64), torch.device("cpu")).tolist()
    return low, high


def check_sizes(sizes: Iterable[tuple[int, int]], checkpoint: SDXLCheckpoint) -> None:
    """Raises InputError if images of one of these heights and widths do not divide into whole latents."""
    factor = vae_factor(checkpoint.vae_config())
    for side in sorted({side for size in sizes for side in size}):
        if side % factor:
            down = side // factor * factor
            raise InputError(
                f"data.init_args.resolution or data.init_args.buckets.step: images of {side} px a side would be "
                f"trained on, which is not a multiple of {factor}, the VAE's factor; choose a resolution of "
                f"{down or factor} or {down + factor}, or a step that is a multiple of {factor}"
            )


def check_teacher(needed: bool, *adapters: Adapter | None) -> None:
    """Raises InputError if the base is to be the teacher of what does not keep it."""
    if needed and any(isinstance(adapter, FullFinetune) for adapter in adapters):
        raise InputError(
            "data.init_args.prior is TeacherPrior, but FullFinetune keeps no copy of the base that could teach; "
            "write ClassImages in its place, or train a LoRA"
        )


def check_quantization(setting: str, quantization: object | None, adapter: Adapter | None) -> None:
    """Raises InputError if weights are to be held in few bits that are to be trained themselves."""
    if quantization is not None and isinstance(adapter, FullFinetune):
        raise InputError(
            f"model.init_args.{setting} is {quantization}, which is for frozen weights, but FullFinetune trains them; "
            "remove the line, or train a LoRA"
        )


def check_clip_skip(clip_skip: int, checkpoint: SDXLCheckpoint) -> None:
    """Raises InputError if that many hidden layers cannot be skipped."""
    layers = min(checkpoint.text_layers())
    if not 0 <= clip_skip < layers:
        raise InputError(
            f"model.init_args.clip_skip is {clip_skip}, but a text encoder has {layers} layers; "
            f"write 0 to {layers - 1}, 0 for the penultimate layer that SDXL was trained with"
        )


def check_what_is_trained(
    adapter: object | None,
    text_encoder_adapter: object | None,
    tokens: object | None,
    settings: Mapping[str, Mapping[str, float | None]],
) -> None:
    """Raises InputError if nothing is trained, or if there are settings of what is not."""
    if not (adapter or text_encoder_adapter or tokens):
        raise InputError("model.init_args: nothing is trained; give an adapter, a text_encoder_adapter or tokens")
    source = {"text_encoders": ("text_encoder_adapter", text_encoder_adapter), "embeddings": ("tokens", tokens)}
    for group, (key, given) in source.items():
        for setting, value in settings[group].items():
            if value is not None and not given:
                raise InputError(
                    f"model.init_args.{group}_{setting} is {value}, but model.init_args.{key} is not given, so there "
                    "is nothing that it could apply to; give it or remove the line"
                )


def check_initializers(
    initializers: Mapping[str, str], counts: Mapping[str, int], tokenizer: "CLIPTokenizer"
) -> list[str]:
    """Finds words that no token starts from.

    Args:
        initializers: For a placeholder, words that its tokens start from.
        counts: Number of tokens of each placeholder.
        tokenizer: Of the base.

    Returns:
        A line for each placeholder of which some of the words would be left out.

    Raises:
        InputError: An initializer is blank.
    """
    warnings = []
    for word, initializer in initializers.items():
        key = f"model.init_args.initializers: '{initializer}' of {word}"
        pieces = tokenizer(initializer, add_special_tokens=False).input_ids
        if not pieces:
            raise InputError(f"{key} has no token; write a word, or leave it out")
        if len(pieces) > counts[word]:
            warnings.append(
                f"{key} is {len(pieces)} tokens of the vocabulary, of which the first {counts[word]} are taken; to "
                f"start from all of them, write {len(pieces)} in model.init_args.tokens"
            )
    return warnings


def latent_statistics_differ(checkpoint: SDXLCheckpoint) -> bool:
    """Tells whether the VAE in use normalises latents in another way than the base's own VAE."""
    used, own = checkpoint.vae_config(), checkpoint.base_vae_config()
    keys = ("latents_mean", "latents_std", "scaling_factor")
    return any(used.get(key) != own.get(key) for key in keys)
