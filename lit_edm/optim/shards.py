"""Parameters of which each process has a shard, as FSDP leaves them to an optimizer."""

from collections.abc import Sequence

from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from lit_edm.errors import InputError


def local(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a tensor in shards; any other one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(part: Tensor, other: Tensor) -> Tensor:
    """Returns the tensor of which this process's shard is given, in the shards of another one; a view of the part."""
    if not isinstance(other, DTensor):
        return part
    mesh, shape, stride = other.device_mesh, other.shape, other.stride()
    return DTensor.from_local(part, mesh, other.placements, run_check=False, shape=shape, stride=stride)


def part_of(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns what this process has of a tensor, whole and the same on all or in shards, in the shards of another."""
    if not isinstance(other, DTensor) or isinstance(tensor, DTensor) or tensor.dim() == 0:
        return local(tensor)
    whole = tensor.reshape(other.shape)
    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None).to_local()


def sum_of_shards(sums: Tensor, parameters: Sequence[Tensor], fsdp_in_use: bool) -> Tensor:
    """Returns sums over whole parameters, given those over what this process has of them.

    Args:
        sums: On the parameters' device; left as they are.
        parameters: In shards (DTensor) all of them, or none.
        fsdp_in_use: Whether each process has a part of them in a way that cannot be seen; that of FSDP1 can.
    """
    first = parameters[0]
    if isinstance(first, DTensor):
        parts = [Partial() if placement.is_shard() else placement for placement in first.placements]
        return DTensor.from_local(sums, first.device_mesh, parts, run_check=False).full_tensor()
    if fsdp_in_use or hasattr(first, "_fsdp_flattened"):
        sums = sums.clone()
        distributed.all_reduce(sums)
    return sums


def check_shards(parameters: Sequence[Tensor], slice_p: int) -> None:
    """Raises InputError if some parameters of a group are in shards and others are not, or shards would be sliced."""
    in_shards = {isinstance(parameter, DTensor) for parameter in parameters}
    if len(in_shards) > 1:
        raise InputError(
            "GroupedProdigy: a group has parameters in shards and whole ones; give each a group of its own"
        )
    if True in in_shards and slice_p > 1:
        raise InputError(f"GroupedProdigy.slice_p is {slice_p}; it must be 1 for parameters in shards (DTensor)")
