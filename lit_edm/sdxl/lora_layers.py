"""peft's LoRA and DoRA layers, whose usual forward passes take a few operations in the precision of their input."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d, Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn import functional

from lit_edm.sdxl.low_rank import Size, patterns


def lora_config(sizes: Mapping[str, Size], **settings: Any) -> LoraConfig:
    """Returns peft's description of LoRA updates of the named layers, which are layers of this module.

    Args:
        sizes: Of the update of each layer.
        settings: Of LoraConfig.
    """
    config = LoraConfig(**patterns(sizes), **settings)
    config._register_custom_module({nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d})
    return config


class LoRALinear(Linear):
    """peft's layer, which computes W x + s B A x of one adapter in the precision that W x has.

    peft casts x to the precision of A and B, float32 where they are trained, and keeps that for the backward pass. Here
    A and B are cast, which are small; their gradients are float32 again. The update is added to W x by the product that
    makes it, in place. Everything else, such as several adapters at once, is left to peft.

    DoRA's m (W + s B A) x / |W + s B A| is the same scaled by rows, of a W + s B A that is never formed.
    """

    casts: ClassVar[bool] = True
    """Needs no autocast to compute in the precision of its input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output (..., out) for an input (..., in)."""
        name = None if args or kwargs else only_adapter(self)
        if name is None:
            return super().forward(x, *args, **kwargs)
        a, b, scale = factors_of(self, name)
        base: Any = self.base_layer
        rows = x.flatten(0, -2)
        output = base(rows)
        if self.training:
            rows = self.lora_dropout[name](rows)
        reduced = functional.linear(rows, a.to(rows.dtype)).to(output.dtype)
        output = output.addmm_(reduced, b.to(output.dtype).t(), alpha=scale)
        if name in self.lora_variant:
            magnitude: Any = self.lora_magnitude_vector[name]
            output = ScaleRows.apply(output, magnitude.weight / norms(base.weight, a, b, scale), base.bias)
        return output.unflatten(0, x.shape[:-1])


class LoRAConv2d(Conv2d):
    """peft's layer, which computes a convolution and the update of one adapter in the precision of the convolution."""

    @property
    def casts(self) -> bool:
        """Needs no autocast to compute in the precision of its input."""
        return not self.lora_variant

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output (B, C_out, h, w) for an input (B, C_in, H, W)."""
        name = None if args or kwargs else only_adapter(self)
        if name is None or name in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        a, b, scale = factors_of(self, name)
        first: Any = self.lora_A[name]
        output = self.base_layer(x)
        if self.training:
            x = self.lora_dropout[name](x)
        reduced = functional.conv2d(x, a.to(x.dtype), None, first.stride, first.padding)
        return output.add_(functional.conv2d(reduced, b.to(reduced.dtype)).to(output.dtype), alpha=scale)


class ScaleRows(torch.autograd.Function):
    """c y + (1 - c) bias by columns, computed in float32.

    y's are the outputs of layers, and what comes next keeps those scaled: so they are kept here too, at no cost.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, factors: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the scaled outputs (N, out) of y (N, out) by factors (out,), float32, around a bias (out,)."""
        scaled = torch.empty_like(y)
        if bias is None:
            torch.mul(y, factors, out=scaled)
        else:
            torch.addcmul(bias - bias * factors, y, factors, out=scaled)
        ctx.save_for_backward(scaled, factors, bias)
        return scaled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        """Returns the gradients of y and of the factors."""
        scaled, factors, bias = ctx.saved_tensors
        of_factors = None
        if ctx.needs_input_grad[1]:
            products = gradient * (scaled if bias is None else scaled - bias)
            of_factors = products.sum(dim=0, dtype=factors.dtype) / factors
        return torch.mul(gradient, factors, out=torch.empty_like(gradient)), of_factors, None


@torch.no_grad()
def norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns |W + s B A| by rows (out,), float32, of W (out, in), A (rank, in) and B (out, rank).

    As |W_i|^2 + 2 s <W_i, (B A)_i> + s^2 |(B A)_i|^2, with <W_i, (B A)_i> = B_i . (W A^T)_i and |(B A)_i|^2 =
    B_i A A^T B_i^T: products with matrices of low rank. They get no gradient (Liu et al., 2024, section 4.3).
    """
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_()
    products = functional.linear(weight, a.to(weight.dtype)).float()
    a, b = a.float(), b.float()
    products = torch.addmm(products, b, a @ a.t(), beta=2 * scale, alpha=scale**2)
    squares += (b * products).sum(dim=1)
    return squares.clamp_(min=torch.finfo(torch.float32).tiny).sqrt_()


def factors_of(layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """Returns A, B and s of an adapter of a layer of peft."""
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def only_adapter(layer: Linear | Conv2d) -> str | None:
    """Returns the name of the one adapter that a layer computes with; None if that is not all there is to do."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged_adapters or len(names) != 1:
        return None
    name = names[0]
    if name not in layer.lora_A or layer.lora_bias[name]:
        return None
    variant = layer.lora_variant.get(name)
    if variant is None:
        return name
    drops = layer.training and isinstance(layer.lora_dropout[name], nn.Dropout)
    return name if isinstance(variant, DoraLinearVariant) and not drops else None
