"""What training takes of a device's memory, counted before it begins."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lit_edm.sdxl.compilation import uncompiled
from lit_edm.sdxl.low_rank import casts_all_it_trains

GIB = 2**30

CONTEXT = 77
"""Tokens of a caption that a UNet is conditioned on, for SDXL and all that are made from it."""

STATES_OF_ADAM = 2
"""Numbers that most optimizers keep of each trained one: running mean and running square of the gradient."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that stay on the device from one step to the next, and what the backward pass of a step needs.

    Left out is what CUDA itself takes (about half a GiB), what the largest block needs while it is computed or, with
    gradient checkpointing, computed again, and what pictures need, which are rendered while nothing is kept.

    Args:
        frozen: Weights that are not trained.
        trained: Weights that are.
        optimizer: State of the optimizer.
        average: Average of the weights.
        activations: What the forward pass keeps for the backward pass; None if it could not be counted.
    """

    frozen: int
    trained: int
    optimizer: int
    average: int
    activations: int | None

    @property
    def gradients(self) -> int:
        """Of the trained weights."""
        return self.trained

    @property
    def total(self) -> int:
        """All of it."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.average + (self.activations or 0)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def bytes_kept(network: nn.Module, dtype: torch.dtype, *args: Any, **kwargs: Any) -> int | None:
    """Counts what a network's forward pass keeps for the backward pass, by running it without computing anything.

    The network runs as it is, adapters and gradient checkpointing included; see run_without_values.

    Args:
        network: The network, on any device, which is left as it is.
        dtype: What autocast has layers compute in.
        args: Of its forward pass; tensors are on the meta device.
        kwargs: Likewise.

    Returns:
        Bytes; None if some layer asks for values.
    """
    kept: dict[int, Any] = {}  # by storage, each of which is kept once; held here so that no other takes its address

    def keep(storage: Any, of_weight: bool) -> None:
        if not of_weight:
            kept[storage._cdata] = storage

    try:
        run_without_values(network, dtype, keep, *args, **kwargs)
    except RuntimeError:
        return None
    return sum(storage.nbytes() for storage in kept.values())


def run_without_values(
    network: nn.Module, dtype: torch.dtype, keep: Callable[[Any, bool], None], *args: Any, **kwargs: Any
) -> None:
    """Runs a network's forward pass on tensors that have shapes and no values.

    Args:
        network: The network, on any device, which is left as it is.
        dtype: What autocast has layers compute in; see Autocast.
        keep: Called with the storage of each tensor as it is kept for the backward pass, and whether it is a weight's.
        args: Of the forward pass; tensors are on the meta device.
        kwargs: Likewise.

    Raises:
        RuntimeError: Some layer asks for values.
    """
    weights = on_meta(network)
    own = {weight.untyped_storage()._cdata for weight in weights.values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        keep(storage, storage._cdata in own)
        return tensor

    with (
        uncompiled(network),
        torch.random.fork_rng(devices=[]),
        Autocast(dtype),
        saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        functional_call(network, weights, args, kwargs)


def on_meta(network: nn.Module) -> dict[str, Tensor]:
    """Returns a network's weights and buffers without values."""
    named = (*network.named_parameters(), *network.named_buffers())
    return {name: value.detach().to("meta").requires_grad_(value.requires_grad) for name, value in named}


class Autocast(TorchFunctionMode):
    """Does with tensors without values what GPUs do under Lightning's autocast, which meta tensors have none of.

    Layers compute in half precision, from copies of weights that are held in float32, made anew each time, and norms in
    float32. Attention keeps no weights of pairs of pixels, as without values torch would.

    Args:
        dtype: Half precision; or float32, which leaves precisions as they are.
    """

    layers: ClassVar = {"linear", "conv2d", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm"}
    norms: ClassVar = {"layer_norm", "group_norm"}

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls an operation; a mask of attention, if there is one, changes nothing in what is kept."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is functional.scaled_dot_product_attention:
            given = (*args, *(kwargs[key] for key in ("query", "key", "value") if key in kwargs))
            parts = given[:3] if self.dtype == torch.float32 else (in_precision(part, self.dtype) for part in given[:3])
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts)[0]
        if self.dtype == torch.float32 or name not in self.layers | self.norms:
            return func(*args, **kwargs)
        dtype = self.dtype if name in self.layers else torch.float32
        own = {key: in_precision(value, dtype) for key, value in kwargs.items()}
        return func(*(in_precision(value, dtype) for value in args), **own)


def in_precision(value: Any, dtype: torch.dtype) -> Any:
    """Returns an argument in a precision, if it is a tensor of floats."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def kept_by_unet(unet: Any, dtype: torch.dtype, shape: tuple[int, int, int, int], learns_text: bool) -> int | None:
    """Counts what an SDXL UNet keeps; see bytes_kept.

    Args:
        unet: UNet2DConditionModel.
        dtype: What it computes in.
        shape: Of a batch of latents, (B, C, h, w).
        learns_text: Whether the gradient goes on to what it is conditioned on.
    """
    args, kwargs = unet_inputs(unet.config, dtype, shape, learns_text)
    return bytes_kept(unet, autocast_of(unet, dtype), *args, **kwargs)


def autocast_of(unet: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Returns what autocast has a UNet's layers compute in: float32 where SDXLDenoiser leaves it out; see Autocast."""
    return torch.float32 if casts_all_it_trains(unet) else dtype


def unet_inputs(
    config: Any, dtype: torch.dtype, shape: tuple[int, int, int, int], learns_text: bool
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Returns arguments without values of the forward pass of an SDXL UNet with a config; see kept_by_unet."""
    count = shape[0]
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    context = nothing(count, CONTEXT, config.cross_attention_dim, dtype=dtype).requires_grad_(learns_text)
    added = {"text_embeds": nothing(count, pooled, dtype=dtype), "time_ids": nothing(count, 6)}
    return (nothing(*shape, dtype=dtype), nothing(count), context), {"added_cond_kwargs": added}


def kept_by_text_encoder(encoder: Any, dtype: torch.dtype, count: int) -> int | None:
    """Counts what a CLIP text encoder keeps of so many captions, as long as it reads them; see bytes_kept."""
    captions = nothing(count, encoder.config.max_position_embeddings, dtype=torch.int64)
    return bytes_kept(encoder, dtype, captions, output_hidden_states=True)


def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns a tensor that has a shape and no values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def state_of(optimizer: Optimizer) -> int:
    """Returns the bytes that an optimizer will keep of all that it trains, by what it keeps of a small matrix."""
    numbers = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
    each = [state_per_value(optimizer, group) for group in optimizer.param_groups]
    return sum(round(size * count) for size, count in zip(each, numbers, strict=True))


def state_per_value(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Returns the bytes that an optimizer keeps of each number in a group: it steps a matrix that is not the run's."""
    matrix = nn.Parameter(torch.ones(64, 64, device=group["params"][0].device))
    matrix.grad = torch.ones_like(matrix)
    rate = group.get("initial_lr", group["lr"]) or 1.0  # some step nothing at a rate of 0, where a warm-up begins
    twin = object.__new__(type(optimizer))
    twin.__dict__ = {**vars(optimizer), "state": defaultdict(dict)}
    twin.__dict__ |= {"param_groups": [{**group, "params": [matrix], "lr": rate}]}
    twin.__dict__ |= {f"_optimizer_step_{when}_hooks": OrderedDict() for when in ("pre", "post")}
    try:
        type(optimizer).step(twin)
    except Exception:  # whatever an optimizer from elsewhere cannot do with a matrix that it does not know
        return STATES_OF_ADAM * matrix.element_size()
    kept = [value for value in twin.state[matrix].values() if isinstance(value, Tensor) and value.numel() > 1]
    return bytes_of(kept) / matrix.numel()
