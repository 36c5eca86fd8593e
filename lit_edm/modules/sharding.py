"""A UNet in shards (FSDP2, Zhao et al. 2023): each process keeps its own part of every weight, and lends it to others.

What else is trained, of text encoders and of the loss, is small, and whole on every process.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters

from lit_edm.optim.shards import local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(unet: nn.Module, mesh: "DeviceMesh", dtype: torch.dtype) -> None:
    """Leaves each process its shard of every weight, in place; a block is whole while it computes.

    Args:
        unet: UNet2DConditionModel, the same on all processes.
        mesh: The processes.
        dtype: What blocks are made whole in. Shards keep their precision, and gradients are averaged in float32.
    """
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    # Inputs are left to autocast: bfloat16 would turn a size of 1023 into 1024.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = [block for block in unet.modules() if isinstance(block, BasicTransformerBlock | ResnetBlock2D)]
    for module in (*blocks, unet):  # what is in no block, too, is in shards whenever somebody looks at it
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


@torch.no_grad()
def agree(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Gives all processes the first one's values, as DDP does: what starts at random may differ."""
    for tensor in tensors:
        value = tensor.detach().to(device)
        distributed.broadcast(value, src=0)
        tensor.copy_(value)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages the gradients of parameters that are not in shards over all processes."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if gradients:
        vector = parameters_to_vector(gradients)
        distributed.all_reduce(vector)
        vector_to_parameters(vector / distributed.get_world_size(), gradients)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, by_norm: bool = True) -> None:
    """Clips the norm of gradients, or each of their values, some being in shards: torch wants all or none to be."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [local(gradient) for gradient in gradients]
    if by_norm:
        torch._foreach_mul_(parts, (limit / (total_norm(gradients) + 1e-6)).clamp(max=1.0))
    else:
        torch._foreach_clamp_min_(parts, -limit)
        torch._foreach_clamp_max_(parts, limit)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Returns the norm of all entries of tensors, (), some of which may be in shards; the same on all processes."""
    tensors = list(tensors)
    norm = get_total_norm([tensor for tensor in tensors if not isinstance(tensor, DTensor)])
    shards = [tensor.to_local() for tensor in tensors if isinstance(tensor, DTensor)]
    if not shards:
        return norm
    square = get_total_norm(shards) ** 2
    distributed.all_reduce(square)
    return (square + norm.to(square.device) ** 2).sqrt()


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Lends every process all weights, so that it may run networks without the others.

    All have to come here together, and to leave together.
    """
    shards = [part for part in module.modules() if isinstance(part, FSDPModule)]
    with torch.inference_mode(False):  # what is allocated here is trained with later
        for part in shards:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
    try:
        yield
    finally:
        for part in shards:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Lends the first process all weights as they are, on the CPU, for whoever writes or measures them.

    All have to come here together. No network runs meanwhile.
    """
    lent: list[tuple[nn.Module, str, nn.Parameter]] = []
    for part in list(module.modules()):
        for name, parameter in list(part.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                value = nn.Parameter(whole(parameter), parameter.requires_grad)
                lent.append((part, name, parameter))
                part.register_parameter(name, value)
    try:
        yield
    finally:
        for part, name, parameter in lent:
            part.register_parameter(name, parameter)


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor in shards, on the CPU, to the first process, and nothing of it to others.

    All have to ask together. A tensor that is whole is returned as it is.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    value = tensor.full_tensor().detach()
    return value.cpu() if distributed.get_rank() == 0 else value.new_empty(0)


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns a copy of a tensor, whole and the same on all processes, on the device and in the shards of another."""
    value = tensor.detach().to(other.device, copy=True)
    if not isinstance(other, DTensor):
        return value
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)
