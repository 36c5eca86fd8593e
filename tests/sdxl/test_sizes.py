"""Bases of random weights in their sizes, on tensors without values."""

import json
from pathlib import Path

import pytest
import torch

from lit_edm.sdxl import LoRA
from lit_edm.sdxl.checkpoint import SDXLCheckpoint
from lit_edm.sdxl.low_rank import updated_layers
from lit_edm.sdxl.sizes import SIZES
from lit_edm.sdxl.tiny import made_in, make_pipeline, make_tiny_sdxl, make_tokenizer, make_unet


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_full_is_of_sdxls_size() -> None:
    with made_in(torch.bfloat16, "meta"):
        pipeline = make_pipeline(SIZES["full"])
    assert pipeline.unet.dtype == torch.bfloat16
    assert parameters(pipeline.unet) == 2_567_463_684
    assert parameters(pipeline.vae) == 83_653_863
    assert parameters(pipeline.text_encoder) == 123_060_480
    assert parameters(pipeline.text_encoder_2) == 694_659_840


@pytest.mark.parametrize(("size", "trained"), [("small", 1_756_160), ("full", 11_612_160)])
def test_lora_updates_the_same_560_layers(size: str, trained: int) -> None:
    with made_in(torch.float32, "meta"):
        unet = make_unet(SIZES[size]).requires_grad_(False)  # type: ignore[index]
        LoRA(rank=8)(unet)
    assert len(updated_layers(unet)) == 560
    assert sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad) == trained


def test_precision_and_device_are_put_back() -> None:
    with made_in(torch.float16, "meta"):
        assert (torch.empty(1).dtype, torch.empty(1).device.type) == (torch.float16, "meta")
    assert (torch.empty(1).dtype, torch.empty(1).device.type) == (torch.float32, "cpu")


def test_small_is_written_and_read(tmp_path: Path) -> None:
    make_tiny_sdxl(tmp_path, size="small")
    base = SDXLCheckpoint(str(tmp_path))
    assert parameters(base.load_unet(torch.float32)) == 58_284_868
    assert [encoder.config.num_hidden_layers for encoder in base.load_text_encoders(torch.float32)] == [12, 32]
    assert json.loads((tmp_path / "unet/config.json").read_text())["transformer_layers_per_block"] == [1, 2, 10]


def test_a_large_vocabulary_ends_with_the_end_of_text() -> None:
    small, large = (make_tokenizer(size, pad_token="!") for size in (514, 1000))
    assert (len(small), len(large)) == (514, 1000)
    assert large.eos_token_id == 999
    assert small("a cat", add_special_tokens=False).input_ids == large("a cat", add_special_tokens=False).input_ids
