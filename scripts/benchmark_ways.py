"""Times ways to compute the adapted UNet against each other, in turns: `python scripts/benchmark_ways.py`.

Prints a table. Each way is timed forward and backward against the package's own, which comes right before it, so that
what else the machine does falls out.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import Any, Literal

import torch
from benchmark_floor import clock
from benchmark_report import table
from diffusers.models.attention_processor import AttnProcessor
from jsonargparse import auto_cli
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_edm.sdxl import DoRA, LoRA
from lit_edm.sdxl.compilation import compile_blocks
from lit_edm.sdxl.lora_layers import LoRALinear
from lit_edm.sdxl.memory import unet_inputs
from lit_edm.sdxl.sizes import SIZES, SizeName
from lit_edm.sdxl.tiny import made_in, make_unet

ADAPTERS = {"LoRA": LoRA(), "DoRA": DoRA()}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
OURS = LoRALinear.forward


def main(
    size: SizeName = "small",
    side: int = 256,
    batch_size: int = 3,
    rounds: int = 8,
    device: str = "cpu",
    measured: Literal["cpu", "wall"] = "cpu",
    compiled: bool = True,
) -> None:
    """Prints how long each way takes of the time of the package's own.

    Args:
        size: Of the base, whose weights are random.
        side: Height and width of the images in pixels.
        batch_size: Images in a batch.
        rounds: Times that each way has its turn, after one that does not count.
        device: Where to compute.
        measured: CPU time of this process, or wall time.
        compiled: Whether to time compiled blocks, which take minutes to compile.
    """
    now, rows = clock(measured, torch.device(device)), []
    for adapter in ADAPTERS:
        for precision, dtype in DTYPES.items():
            usual = unet_of(adapter, size, dtype, device)
            shape = batch_size, usual.config.in_channels, side // 8, side // 8
            for way, (change, context) in ways(dtype, device, compiled).items():
                unet = unet_of(adapter, size, dtype, device)
                change(unet)
                first = seconds(unet, shape, dtype, context, time.perf_counter)
                seconds(usual, shape, dtype, nullcontext, now)
                ratios = [
                    seconds(unet, shape, dtype, context, now) / seconds(usual, shape, dtype, nullcontext, now)
                    for _ in range(rounds)
                ]
                rows.append([way, adapter, precision, f"{median(ratios):.3f}", f"{first:.1f}"])
    print("\n".join(table(["way", "adapter", "precision", "time over the usual way's", "first pass s"], rows, text=3)))


def unet_of(adapter: str, size: SizeName, dtype: torch.dtype, device: str) -> Any:
    """Returns a UNet with what is trained."""
    with made_in(dtype, device):
        unet = make_unet(SIZES[size]).requires_grad_(False)
        ADAPTERS[adapter](unet)
    return unet.train()


def ways(
    dtype: torch.dtype, device: str, compiled: bool
) -> dict[str, tuple[Callable[[Any], Any], Callable[[], AbstractContextManager[Any]]]]:
    """Returns, by name, what each way changes of a UNet, and the context that it computes in."""

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)

    @contextmanager
    def layers_of_peft() -> Iterator[None]:
        LoRALinear.forward = Linear.forward
        with autocast():
            yield
        LoRALinear.forward = OURS

    def math() -> AbstractContextManager[Any]:
        return sdpa_kernel(SDPBackend.MATH)

    found: dict[str, tuple[Callable[[Any], Any], Callable[[], AbstractContextManager[Any]]]] = {
        "peft's layers": (nn.Module.train, layers_of_peft),
        "channels_last": (lambda unet: unet.to(memory_format=torch.channels_last), nullcontext),
        "AttnProcessor": (lambda unet: unet.set_attn_processor(AttnProcessor()), nullcontext),
        "SDPA's MATH": (nn.Module.train, math),
    }
    found |= {} if dtype == torch.float32 else {"autocast": (nn.Module.train, autocast)}
    return found | ({"compiled blocks": (compile_blocks, nullcontext)} if compiled else {})


def seconds(
    unet: Any,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    context: Callable[[], AbstractContextManager[Any]],
    now: Callable[[], float],
) -> float:
    """Returns how long a pass forward and backward takes."""
    given, added = unet_inputs(unet.config, dtype, shape, learns_text=False)
    args = [torch.ones_like(value, device=unet.device) for value in given]
    kwargs = {key: torch.ones_like(value, device=unet.device) for key, value in added["added_cond_kwargs"].items()}
    unet.zero_grad(set_to_none=True)
    start = now()
    with context():
        output = unet(*args, added_cond_kwargs=kwargs).sample
    output.backward(torch.ones_like(output))
    return now() - start


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
