"""SDXL-shaped checkpoints with random weights, so that tests, a first run and measurements need no download."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from lit_edm.sdxl.sizes import SIZES, BaseSize, SizeName


def make_tiny_sdxl(
    folder: Path,
    prediction: Literal["epsilon", "v_prediction", "edm"] = "epsilon",
    seed: int = 0,
    size: SizeName = "tiny",
) -> None:
    """Writes a checkpoint of SDXL's classes, conditioning and file layout, of about 2 MB, that has learned nothing.

    The second text encoder says eos_token_id: 2, as SDXL's does, and the second tokenizer pads with "!". Words are
    spelled by the byte: the vocabulary needs no file.

    Args:
        folder: Where to write.
        prediction: What the scheduler's config says the UNet predicts; edm is as Playground v2.5, which also has
            statistics of its latents.
        seed: Seed of the weights.
        size: small has SDXL's layers, narrower, 300 MB in all; full is of SDXL's size, 7 GB in half precision.
    """
    with torch.random.fork_rng(), made_in(torch.float16 if size == "full" else torch.float32):
        torch.manual_seed(seed)
        make_pipeline(SIZES[size], prediction).save_pretrained(folder)
    add_key_prefix(folder / "text_encoder" / "model.safetensors", "text_model.")


@contextmanager
def made_in(dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[None]:
    """Has networks made in a precision and on a device, so that they never take more room than they are to keep."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def make_pipeline(size: BaseSize, prediction: str = "epsilon") -> Any:
    """Returns a pipeline with random weights; see make_tiny_sdxl."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first, second = (text_config(settings, size.vocabulary) for settings in size.text_encoders)
    with torch.device("cpu"):  # which asks for the values of its noise levels
        scheduler = make_scheduler(prediction)
    return StableDiffusionXLPipeline(
        vae=make_vae(size, with_statistics=prediction == "edm"),
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=make_tokenizer(size.vocabulary, pad_token="<|endoftext|>"),
        tokenizer_2=make_tokenizer(size.vocabulary, pad_token="!"),
        unet=make_unet(size),
        scheduler=scheduler,
    )


def make_vae(size: BaseSize, with_statistics: bool = False) -> Any:
    """Returns a VAE, which asks for float32 as SDXL's does."""
    from diffusers import AutoencoderKL

    config: dict[str, Any] = {"latent_channels": 4, "scaling_factor": 0.13025, **size.vae}
    if with_statistics:
        mean, std = [-1.6, 1.1, 0.3, -0.2], [8.4, 7.3, 6.5, 5.2]
        config |= {"latents_mean": mean, "latents_std": std, "scaling_factor": 0.5}
    return AutoencoderKL(**config).eval()


def make_unet(size: BaseSize) -> Any:
    """Returns a UNet conditioned as SDXL's is."""
    from diffusers import UNet2DConditionModel

    first, second = size.text_encoders
    config: dict[str, Any] = {
        "use_linear_projection": True,
        "cross_attention_dim": first["hidden_size"] + second["hidden_size"],
        "addition_embed_type": "text_time",
        "projection_class_embeddings_input_dim": 6 * size.unet["addition_time_embed_dim"] + second["projection_dim"],
        **size.unet,
    }
    return UNet2DConditionModel(**config).eval()


def text_config(settings: Mapping[str, Any], vocabulary: int) -> Any:
    """Returns the config of a CLIP text encoder."""
    from transformers import CLIPTextConfig

    usual: dict[str, Any] = {"max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2}
    return CLIPTextConfig(vocab_size=vocabulary, **{**usual, **settings})


def make_tokenizer(vocabulary: int, pad_token: str) -> Any:
    """Returns CLIP's tokenizer without merges, over 256 bytes, inside and at the end of words, and two marks.

    A larger vocabulary is filled with words that no text has, before the marks: SDXL pools at the largest id.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    words += [f"<|unused {index}|>" for index in range(len(words), vocabulary - 2)]
    words += ["<|startoftext|>", "<|endoftext|>"]
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
