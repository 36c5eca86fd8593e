"""Frozen weights in 8 or 4 bits: numbers of a block have a scale in common, and layers make a weight as they need it.

What is trained on such a base sees the weights that `weight` returns, and those alone: outputs and gradients are to the
bit those of a plain layer that holds them. Nothing but torch is needed. Both ways are measured in benchmarks/, where
float8 is not among them: at the same size its errors are four times those of int8.
"""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.nn.grad import conv2d_input

from lit_edm.sdxl.layers import matches

Quantization = Literal["int8", "nf4"]
"""How weights are held: as whole numbers from -127 to 127, or as places among the 16 levels of NF4, two in a byte."""

BLOCK = 64
"""Numbers that have a scale in common, as in QLoRA: 8.25 or 4.25 bits a number, with scales of 16 bits."""

WHOLE = ("conv_in", "conv_out", "time_embedding", "add_embedding", "text_projection")
"""Layers at the ends of UNet and text encoders, whose errors nothing evens out: 0.3 % of SDXL's weights."""


class QuantizedLayer(nn.Module):
    """A linear layer or a convolution whose frozen weight is held in codes.

    The backward pass makes the weight anew, where autograd would keep it from the forward pass on.
    """

    codes: nn.Parameter
    """(blocks, 64) int8, or (blocks, 32) uint8: integers, which no cast of a network's precision touches."""
    scales: nn.Parameter
    """(blocks, 1), in the precision that the layer computes in."""
    levels: nn.Parameter | None
    """(256, 2), the numbers that each byte of NF4 stands for, which all layers of a network share; None for int8."""
    shape: torch.Size
    """Of the weight."""

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, made from the codes."""
        return decode(self.codes, self.scales, self.levels).view(self.shape)


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[override] (of a weight that is no parameter)
    """A linear layer; see QuantizedLayer."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as nn.Linear calls it)
        """Returns W x + b."""
        return _Linear.apply(input, self.codes, self.scales, self.levels, self.shape, self.bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[override] (likewise)
    """A convolution, padded with zeros; see QuantizedLayer."""

    def __new__(cls, *sizes: Any, **settings: Any) -> Any:
        """Makes a plain convolution for whoever gives sizes: peft asks a layer's class for the update's own layers."""
        return nn.Conv2d(*sizes, **settings) if sizes or settings else super().__new__(cls)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as nn.Conv2d calls it)
        """Returns W * x + b."""
        geometry = self.stride, self.padding, self.dilation, self.groups
        return _Conv2d.apply(input, self.codes, self.scales, self.levels, self.shape, self.bias, geometry)


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        levels: Tensor | None,
        shape: torch.Size,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, levels)
        ctx.shape = shape
        return functional.linear(x, decode(codes, scales, levels).view(shape), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override] (torch's are *args)
        return grad @ decode(*ctx.saved_tensors).view(ctx.shape), *(None,) * 5


class _Conv2d(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        levels: Tensor | None,
        shape: torch.Size,
        bias: Tensor | None,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, levels)
        ctx.shape, ctx.geometry, ctx.size = shape, geometry, x.shape
        return functional.conv2d(x, decode(codes, scales, levels).view(shape), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override] (torch's are *args)
        weight = decode(*ctx.saved_tensors).view(ctx.shape)
        return conv2d_input(ctx.size, weight, grad, *ctx.geometry), *(None,) * 6


def quantize(network: nn.Module, quantization: Quantization) -> None:
    """Puts the weights of linear layers and convolutions into codes, in place, one layer after another.

    Layers stay what they are to whoever looks for them. Those at the ends of the network, and the few whose weights
    are no whole number of blocks, keep their weights.

    Args:
        network: Frozen, on any device but meta.
        quantization: How.
    """
    kinds: dict[type, type[QuantizedLayer]] = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}
    layers = {name: layer for name, layer in network.named_modules() if type(layer) in kinds}
    levels: nn.Parameter | None = None
    for name, layer in cast(dict[str, Any], layers).items():
        weight = layer.weight.detach()
        if weight.numel() % BLOCK or any(matches(name, end) for end in WHOLE):
            continue
        if quantization == "nf4" and levels is None:
            pairs = torch.cartesian_prod(nf4_levels(), nf4_levels())
            levels = nn.Parameter(pairs.to(weight.device, weight.dtype), requires_grad=False)
        codes, scales = encode(weight.reshape(-1, BLOCK), quantization)
        del layer.weight
        layer.__class__ = kinds[type(layer)]
        layer.codes, layer.scales = (nn.Parameter(part, requires_grad=False) for part in (codes, scales))
        layer.levels, layer.shape = levels, weight.shape


def encode(blocks: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of numbers (blocks, 64): the nearest that can be held; see QuantizedLayer."""
    scales = blocks.abs().amax(dim=1, keepdim=True) / (127 if quantization == "int8" else 1)
    numbers = blocks.float() / torch.where(scales > 0, scales, 1).float()
    if quantization == "int8":
        return numbers.round().clamp(-127, 127).to(torch.int8), scales
    levels = nf4_levels().to(blocks.device)
    places = torch.bucketize(numbers, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return 16 * places[:, ::2] + places[:, 1::2], scales


def decode(codes: Tensor, scales: Tensor, levels: Tensor | None) -> Tensor:
    """Returns the numbers (blocks, 64) of codes, in the precision of their scales; see QuantizedLayer."""
    numbers = codes if levels is None else functional.embedding(codes.int(), levels).flatten(1)
    return numbers * scales


def nf4_levels() -> Tensor:
    """Returns the 16 levels of NF4, float32: quantiles of a normal distribution, 0 and 1 exact (Dettmers et al., 2023).

    There are seven below 0, and eight above it.
    """
    end = 1 - (1 / 30 + 1 / 32) / 2
    below, above = (torch.special.ndtri(torch.linspace(0.5, end, n, dtype=torch.float64)) for n in (8, 9))
    levels = torch.cat([-below.flip(0), above[1:]])
    return (levels / levels.max()).float()
