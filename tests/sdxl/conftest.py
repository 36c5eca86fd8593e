from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@pytest.fixture
def sdxl_unet() -> dict[str, Any]:
    """The published config of SDXL 1.0's UNet, as far as it differs from diffusers' defaults."""
    return {
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


@pytest.fixture
def held() -> Callable[..., int]:
    """Counts the bytes that a forward pass with values keeps for the backward pass."""

    def count(network: nn.Module, *args: Any, **kwargs: Any) -> int:
        own, kept = {weight.untyped_storage().data_ptr() for weight in network.state_dict(keep_vars=True).values()}, {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = network(*args, **kwargs)
        del output
        return sum(storage.nbytes() for address, storage in kept.items() if address not in own)

    return count
