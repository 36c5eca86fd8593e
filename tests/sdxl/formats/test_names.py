import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lit_edm.sdxl.formats.names import from_kohya_name, kohya_name
from lit_edm.sdxl.layers import published_name


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """SDXL's UNet without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def layers(network: nn.Module) -> list[str]:
    kinds = nn.Linear | nn.Conv2d
    return [published_name(network, name) for name, layer in network.named_modules() if isinstance(layer, kinds)]


def test_all_layers_of_sdxl_are_found_again(unet: UNet2DConditionModel) -> None:
    with torch.device("meta"):
        encoders = (kind(CLIPTextConfig()) for kind in (CLIPTextModel, CLIPTextModelWithProjection))
    networks = dict(zip(("unet", "text_encoder", "text_encoder_2"), (unet, *encoders), strict=True))
    names = [(network, name) for network, module in networks.items() for name in layers(module)]
    assert len(names) == 794 + 2 * 72 + 1
    underscored = [kohya_name(*name) for name in names]
    assert len(set(underscored)) == len(names)
    assert [from_kohya_name(name) for name in underscored] == names


def original_names() -> list[str]:
    """Layers of the original SDXL, in kohya's writing, from the list of what its blocks are made of."""
    residual = ("in_layers_2", "emb_layers_1", "out_layers_3")
    attention = [f"transformer_blocks_0_{n}" for n in ("attn1_to_q", "attn2_to_out_0", "ff_net_0_proj", "ff_net_2")]
    attention += ["proj_in", "proj_out"]
    sides = {"input": ((1, 2, 4, 5, 7, 8), (4, 5, 7, 8)), "output": (range(9), range(6))}
    names = []
    for side, (with_residual, with_attention) in sides.items():
        names += [f"{side}_blocks_{i}_0_{layer}" for i in with_residual for layer in residual]
        names += [f"{side}_blocks_{i}_1_{layer}" for i in with_attention for layer in attention]
    names += ["input_blocks_3_0_op", "input_blocks_6_0_op", "output_blocks_2_2_conv", "output_blocks_5_2_conv"]
    names += ["input_blocks_4_0_skip_connection", "output_blocks_8_0_skip_connection"]
    names += [f"middle_block_{i}_{layer}" for i in (0, 2) for layer in residual]
    return names + [f"middle_block_1_{layer}" for layer in attention]


def test_names_of_the_original_sdxl_are_those_that_diffusers_makes_of_them(unet: UNet2DConditionModel) -> None:
    names = original_names()
    for name in names:
        state = {f"lora_unet_{name}.{f}": torch.zeros(1, 1) for f in ("lora_down.weight", "lora_up.weight")}
        mapped = _maybe_map_sgm_blocks_to_diffusers(state, unet.config)
        converted, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
        network, layer = from_kohya_name(f"lora_unet_{name}") or ("", "")
        assert network == "unet"
        assert layer in layers(unet), name
        theirs = {re.sub(r"\.processor|_?\.?lora\.(up|down)\.weight", "", key) for key in converted}
        assert {key.removesuffix("_lora") for key in theirs} == {f"unet.{layer.replace('to_out.0', 'to_out')}"}, (
            converted
        )


@pytest.mark.parametrize(
    ("original", "layer"),
    [
        ("time_embed_0", "time_embedding.linear_1"),
        ("time_embed_2", "time_embedding.linear_2"),
        ("label_emb_0_0", "add_embedding.linear_1"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("input_blocks_0_0", "conv_in"),
        ("out_2", "conv_out"),
    ],
)
def test_layers_outside_of_blocks(original: str, layer: str) -> None:
    assert from_kohya_name(f"lora_unet_{original}") == ("unet", layer)


@pytest.mark.parametrize("name", ["lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_transformer_x", "unet.conv_in"])
def test_other_names_are_not_known(name: str) -> None:
    assert from_kohya_name(name) is None
