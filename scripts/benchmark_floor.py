"""The least that a step of training computes: the networks forward and backward, nothing else."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from lit_edm.modules import SDXLModule
from lit_edm.sdxl.compilation import uncompiled
from lit_edm.sdxl.memory import on_meta

TOKENS = 77


class BareNetworks(nn.Module):
    """The adapted UNet and, while tokens learn, the text encoders, as they are in a module.

    Args:
        module: With its networks loaded.
        learns: Whether tokens learn.
    """

    def __init__(self, module: SDXLModule, learns: bool) -> None:
        super().__init__()
        self.unet: Any = module.denoiser.unet
        self.autocast = module.denoiser.autocast
        self.encoders = nn.ModuleList(module.conditioner.encoders if learns else [])

    def inputs(self, count: int, shape: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
        """Returns what a batch of latents of a shape (C, h, w) gives the networks, in shapes and precisions."""
        config, dtype = self.unet.config, self.unet.conv_in.weight.dtype
        noise = {"device": device, "dtype": dtype}
        inputs = {
            "latents": torch.randn(count, *shape, **noise),
            "c_noise": torch.full((count,), 500.0, device=device),
            "time_ids": torch.full((count, 6), 1024.0, device=device),
        }
        if self.encoders:
            return inputs | {"ids": torch.ones(count, TOKENS, dtype=torch.int64, device=device)}
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        context = torch.randn(count, TOKENS, config.cross_attention_dim, **noise)
        return inputs | {"context": context, "pooled": torch.randn(count, width, **noise)}

    def forward(
        self,
        latents: Tensor,
        c_noise: Tensor,
        time_ids: Tensor,
        ids: Tensor | None = None,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """Returns the UNet's output (B, C, h, w), given captions as ids (B, 77) or as what encoders make of them."""
        if ids is not None:
            outputs: list[Any] = [encoder(ids, output_hidden_states=True) for encoder in self.encoders]
            context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).to(latents.dtype)
            pooled = outputs[-1].text_embeds.to(latents.dtype)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        with self.autocast(latents.device.type):
            return self.unet(latents, c_noise, context, added_cond_kwargs=added).sample


class Floor:
    """Runs the bare networks of a module forward and backward, with the batch size and precision of its training.

    Args:
        module: With its networks on the device.
        learns: Whether tokens learn.
        count: Batch size.
        side: Of the images in pixels.
        precision: Opens the context that training computes in.
    """

    def __init__(
        self,
        module: SDXLModule,
        learns: bool,
        count: int,
        side: int,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.networks = BareNetworks(module, learns)
        self.precision = precision
        self.inputs = self.networks.inputs(count, module.latents.shape(side, side), self.networks.unet.device)
        self.trained = [parameter for parameter in self.networks.parameters() if parameter.requires_grad]

    def __call__(self) -> None:
        """Computes the gradient of all that is trained, which is dropped then."""
        for parameter in self.trained:
            parameter.grad = None
        with torch.enable_grad(), self.precision():
            output = self.networks(**self.inputs)
        output.backward(torch.ones_like(output))
        for parameter in self.trained:
            parameter.grad = None

    def flop(self) -> int:
        """Counts the arithmetic, without what gradient checkpointing computes again."""
        return flop(self.networks, self.inputs)


def flop(networks: BareNetworks, inputs: Mapping[str, Tensor]) -> int:
    """Counts the arithmetic of a pass forward and backward, on tensors without values.

    Args:
        networks: On any device; what checkpointing computes again is left out.
        inputs: Of BareNetworks.inputs.
    """
    given = (on_meta(networks), {name: value.to("meta") for name, value in inputs.items()})
    weights, inputs = (  # in one precision, for there is no autocast
        {name: value.float() if value.is_floating_point() else value for name, value in values.items()}
        for values in given
    )
    with uncompiled(networks), without_checkpointing(networks), FlopCounterMode(display=False) as counter:
        functional_call(networks, weights, kwargs=inputs).sum().backward()
    return counter.get_total_flops()


@contextmanager
def without_checkpointing(network: nn.Module) -> Iterator[None]:
    """Keeps all activations of a network, as long as the context is open."""
    parts: list[Any] = [part for part in network.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in parts:
        part.gradient_checkpointing = False
    try:
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True


def matmul_flops(device: torch.device, dtype: torch.dtype, now: Callable[[], float], repeats: int = 5) -> float:
    """Returns the operations a second of a product of two large square matrices, the best of several."""
    side, times = (8192, 20) if device.type == "cuda" else (1024, 2)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):  # the first finds out how to do it
        start = now()
        for _ in range(times):
            torch.mm(a, b)
        best = min(best, (now() - start) / times)
    return 2 * side**3 / best


def clock(kind: str, device: torch.device) -> Callable[[], float]:
    """Returns what tells the time in seconds, wall or cpu, once a GPU has done all that it was told to do."""
    read = time.process_time if kind == "cpu" else time.perf_counter

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return read()

    return now
