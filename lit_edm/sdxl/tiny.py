"""A tiny SDXL-shaped checkpoint with random weights, so that tests and a first run need no download."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file


def make_tiny_sdxl(
    folder: Path, prediction: Literal["epsilon", "v_prediction", "edm"] = "epsilon", seed: int = 0
) -> None:
    """Writes a checkpoint of SDXL's classes, conditioning and file layout, of about 2 MB, that has learned nothing.

    The second text encoder says eos_token_id: 2, as SDXL's does, and the second tokenizer pads with "!". Words are
    spelled by the byte: the vocabulary needs no file.

    Args:
        folder: Where to write.
        prediction: What the scheduler's config says the UNet predicts; edm is as Playground v2.5, which also has
            statistics of its latents.
        seed: Seed of the weights.
    """
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=make_vae(with_statistics=prediction == "edm"),
            text_encoder=CLIPTextModel(text_config(hidden_size=32)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(hidden_size=48)),
            tokenizer=make_tokenizer(pad_token="<|endoftext|>"),
            tokenizer_2=make_tokenizer(pad_token="!"),
            unet=make_unet(context_dim=32 + 48, pooled_dim=48),
            scheduler=make_scheduler(prediction),
        )
        pipeline.save_pretrained(folder)
    add_key_prefix(folder / "text_encoder" / "model.safetensors", "text_model.")


def make_vae(with_statistics: bool) -> Any:
    """Returns a VAE of factor 2."""
    from diffusers import AutoencoderKL

    config: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.13025,
    }
    if with_statistics:
        mean, std = [-1.6, 1.1, 0.3, -0.2], [8.4, 7.3, 6.5, 5.2]
        config |= {"latents_mean": mean, "latents_std": std, "scaling_factor": 0.5}
    return AutoencoderKL(**config).eval()


def make_unet(context_dim: int, pooled_dim: int) -> Any:
    """Returns a UNet conditioned as SDXL's is."""
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "norm_num_groups": 4,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "cross_attention_dim": context_dim,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + pooled_dim,
        "sample_size": 32,
    }
    return UNet2DConditionModel(**config).eval()


def text_config(hidden_size: int) -> Any:
    """Returns the config of a CLIP text encoder over 256 bytes, inside and at the end of words, and two marks."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=2,
    )


def make_tokenizer(pad_token: str) -> Any:
    """Returns CLIP's tokenizer over a vocabulary without merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    with TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, pad_token=pad_token, model_max_length=77)


def make_scheduler(prediction: str) -> Any:
    """Returns the scheduler that the base's kind comes with: SDXL's Euler, or Playground's EDM DPM-Solver++."""
    from diffusers import EDMDPMSolverMultistepScheduler, EulerDiscreteScheduler

    if prediction == "edm":
        return EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing="leading",
        steps_offset=1,
    )


def add_key_prefix(path: Path, prefix: str) -> None:
    """Renames weights as published checkpoints have them; transformers 5 drops it from models made from a config."""
    weights = load_file(path)
    save_file({prefix + name.removeprefix(prefix): value for name, value in weights.items()}, path, {"format": "pt"})
