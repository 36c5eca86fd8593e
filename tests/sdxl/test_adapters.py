from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from lit_edm.errors import InputError
from lit_edm.sdxl import LoRA, SDXLCheckpoint

SDXL_UNET = {  # the published config of SDXL 1.0's UNet, as far as it differs from diffusers' defaults
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def test_the_real_sdxl_takes_the_adapter() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET).requires_grad_(False)
        base = sum(parameter.numel() for parameter in unet.parameters())
        LoRA(rank=8)(unet)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    # By hand. Transformer blocks of width 640: 2 x 2 down, 3 x 2 up; of 1280: 2 x 10 down, 10 in the middle, 3 x 10 up.
    blocks = {640: 2 * 2 + 3 * 2, 1280: 2 * 10 + 10 + 3 * 10}
    # Each has self-attention, 4 layers d -> d, and cross-attention, 2 layers d -> d and 2 layers 2048 -> d.
    rank, layers = 8, 8
    by_hand = {d: rank * (6 * (d + d) + 2 * (2048 + d)) for d in blocks}
    assert base == 2_567_463_684
    assert len(trained) == 2 * layers * sum(blocks.values()) == 1120
    assert sum(p.numel() for p in trained) == sum(n * by_hand[d] for d, n in blocks.items()) == 11_612_160


def test_the_adapted_unet_starts_as_the_base(tiny: Path) -> None:
    unet = SDXLCheckpoint(str(tiny)).load_unet(torch.float32)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([7.0]), torch.randn(1, 77, 80))
    added = {"text_embeds": torch.randn(1, 48), "time_ids": torch.randn(1, 6)}
    before = unet(*inputs, added_cond_kwargs=added).sample
    LoRA()(unet)
    assert unet(*inputs, added_cond_kwargs=added).sample.equal(before)


def test_trained_values_are_float32_over_a_half_precision_base(tiny: Path) -> None:
    unet = SDXLCheckpoint(str(tiny)).load_unet(torch.bfloat16)
    LoRA()(unet)
    assert {parameter.dtype for parameter in unet.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for parameter in unet.parameters() if not parameter.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (2.0, 0.5)])
def test_alpha_scales_the_update(tiny: Path, alpha: float | None, scale: float) -> None:
    unet = SDXLCheckpoint(str(tiny)).load_unet(torch.float32)
    LoRA(rank=4, alpha=alpha, target_modules=("to_q",))(unet)
    adapted = [module for module in unet.modules() if hasattr(module, "lora_A")]
    assert adapted
    assert {module.scaling["default"] for module in adapted} == {scale}
    assert {module.lora_A["default"].weight.shape[0] for module in adapted} == {4}


def test_bad_settings(tiny: Path) -> None:
    with pytest.raises(InputError, match=r"rank is 0"):
        LoRA(rank=0)
    unet = SDXLCheckpoint(str(tiny)).load_unet(torch.float32)
    with pytest.raises(InputError, match=r"target_modules: the UNet has no layer called to_x"):
        LoRA(target_modules=("to_q", "to_x"))(unet)
