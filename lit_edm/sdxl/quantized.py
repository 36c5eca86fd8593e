"""Frozen weights in 8 bits: whole numbers, and a scale for each block of 64; layers make a weight as they need it.

Whatever is trained on such a base sees the weights that the layers' `weight` returns, and those alone: outputs and
gradients are to the bit those of plain layers that hold them. Nothing but torch is needed, and all adapters work as
ever: DoRA and the starts from a part of W read weights, which those of torchao and bitsandbytes do not give as plain
tensors.

Numbers of a normal distribution are off by 0.6 %; they would be by 2.7 % in float8, which takes as much room, and by
9 % in NF4, which takes half of it.
"""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.nn.grad import conv2d_input

from lit_edm.sdxl.layers import matches

Quantization = Literal["int8"]
"""How weights are held."""

BLOCK = 64
"""Numbers that have a scale in common: 8.25 bits a number, with scales of 16 bits."""

WHOLE = ("conv_in", "conv_out", "time_embedding", "add_embedding", "text_projection")
"""Layers at the ends of UNet and text encoders, whose errors nothing evens out: 0.3 % of SDXL's weights."""


class QuantizedLayer(nn.Module):
    """A linear layer or a convolution whose frozen weight is held in whole numbers.

    The backward pass makes the weight anew, where autograd would keep it from the forward pass on.
    """

    codes: nn.Parameter
    """Of the weight's shape, int8: no cast of a network's precision touches them."""
    scales: nn.Parameter
    """(blocks, 1), in the precision that the layer computes in."""

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with."""
        return decode(self.codes, self.scales)


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[override] (of a weight that is no parameter)
    """A linear layer; see QuantizedLayer."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as nn.Linear calls it)
        """Returns W x + b."""
        return _Linear.apply(input, self.codes, self.scales, self.bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[override] (likewise)
    """A convolution, padded with zeros; see QuantizedLayer."""

    def __new__(cls, *sizes: Any, **settings: Any) -> Any:
        """Makes a plain convolution for whoever gives sizes: peft asks a layer's class for the update's own layers."""
        return nn.Conv2d(*sizes, **settings) if sizes or settings else super().__new__(cls)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as nn.Conv2d calls it)
        """Returns W * x + b."""
        geometry = self.stride, self.padding, self.dilation, self.groups
        return _Conv2d.apply(input, self.codes, self.scales, self.bias, geometry)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return functional.linear(x, decode(codes, scales), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override] (torch's are *args)
        return grad @ decode(*ctx.saved_tensors), None, None, None


class _Conv2d(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape, ctx.geometry = x.shape, geometry
        return functional.conv2d(x, decode(codes, scales), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override] (torch's are *args)
        return conv2d_input(ctx.shape, decode(*ctx.saved_tensors), grad, *ctx.geometry), None, None, None, None


def quantize(network: nn.Module) -> None:
    """Puts the weights of linear layers and convolutions into whole numbers, in place, one layer after another.

    Layers stay what they are to whoever looks for them. Those at the ends of the network, and the few whose weights
    are no whole number of blocks, keep their weights.

    Args:
        network: Frozen, on any device but meta.
    """
    kinds: dict[type, type[QuantizedLayer]] = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}
    layers = {name: layer for name, layer in network.named_modules() if type(layer) in kinds}
    for name, layer in cast(dict[str, Any], layers).items():
        if layer.weight.numel() % BLOCK or any(matches(name, end) for end in WHOLE):
            continue
        codes, scales = encode(layer.weight.detach())
        del layer.weight
        layer.__class__ = kinds[type(layer)]
        layer.codes, layer.scales = (nn.Parameter(part, requires_grad=False) for part in (codes, scales))


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the nearest whole numbers, -127 to 127, and the scales of a weight; see QuantizedLayer."""
    blocks = weight.reshape(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    numbers = blocks.float() / torch.where(scales > 0, scales, 1).float()
    return numbers.round().clamp(-127, 127).to(torch.int8).view(weight.shape), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Returns the weight of whole numbers and scales, in the precision of the scales: one kernel on a GPU."""
    return (codes.view(-1, BLOCK) * scales).view(codes.shape)
