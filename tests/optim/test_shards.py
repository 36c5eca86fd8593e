"""Two processes with a shard of each parameter step as one that has all of it does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lit_edm.errors import InputError
from lit_edm.optim import GroupedProdigy

SHAPES = [(4, 3), (5, 2), (1, 6), (3,)]
"""Of which the second and last have unequal shards, and the third has none on the second process."""

SETTINGS: list[dict[str, Any]] = [{"weight_decay": 0.1}, {"betas": (0.0, 0.9), "decouple": False, "weight_decay": 0.1}]

Place = Callable[[Tensor], Tensor]


def in_processes(function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Calls a function in two processes that know of each other; raises what one of them raises."""
    torch.multiprocessing.start_processes(as_process, (folder, function, arguments), 2, start_method="fork")


def as_process(rank: int, folder: Path, function: Callable[..., None], arguments: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    function(init_device_mesh("cpu", (2,)), *arguments)
    distributed.destroy_process_group()


def made(place: Place, **settings: Any) -> GroupedProdigy:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return GroupedProdigy([nn.Parameter(place(value)) for value in values], d0=1e-3, **settings)


def take(optimizer: GroupedProdigy, place: Place, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in optimizer.param_groups[0]["params"]:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = place(whole(parameter) - 1 + 0.1 * noise)
        optimizer.step()


def whole(tensor: Any) -> Any:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def state_of(optimizer: GroupedProdigy) -> dict[str, Any]:
    """Returns the state as a checkpoint has it that is whole."""
    state = optimizer.state_dict()
    entries = {n: {key: whole(value) for key, value in entry.items()} for n, entry in state["state"].items()}
    return copy.deepcopy({**state, "state": entries})


def assert_same(one: GroupedProdigy, other: GroupedProdigy) -> None:
    for a, b in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(whole(a), whole(b.detach()), rtol=1e-9, atol=1e-9)
        for key, value in one.state[a].items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(
                    whole(value).flatten(), whole(other.state[b][key]).flatten(), rtol=1e-9, atol=1e-9
                )
    torch.testing.assert_close(one.param_groups[0]["d"], other.param_groups[0]["d"], rtol=1e-9, atol=0)


def trains_as_one(mesh: DeviceMesh, settings: dict[str, Any]) -> None:
    """In one go; from a whole checkpoint of one process; and on one process, from one of two."""

    def sharded(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    def same(tensor: Tensor) -> Tensor:
        return tensor

    two, one = made(sharded, **settings), made(same, **settings)
    take(two, sharded, 8)
    take(one, same, 8)
    assert_same(two, one)
    back_on_two, back_on_one = made(sharded, **settings), made(same, **settings)
    for new, old, place in ((back_on_two, one, sharded), (back_on_one, two, same)):
        for to, value in zip(new.param_groups[0]["params"], old.param_groups[0]["params"], strict=True):
            to.detach().copy_(place(whole(value.detach())))
        new.load_state_dict(state_of(old))
        take(new, place, 8, start=8)
    take(two, sharded, 8, start=8)
    assert_same(two, back_on_two)
    assert_same(two, back_on_one)
    assert two.param_groups[0]["d"] > 1e-2


def trains_in_hidden_shards(mesh: DeviceMesh) -> None:
    """Each process has parameters of its own, and says so."""
    mine = made(lambda tensor: tensor)
    parameters = mine.param_groups[0]["params"]
    part = GroupedProdigy(
        [nn.Parameter(parameter.detach().clone()) for parameter in parameters[mesh.get_rank() :: 2]], d0=1e-3
    )
    part.param_groups[0]["fsdp_in_use"] = True
    for _ in range(8):
        for optimizer in (mine, part):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = parameter.detach() - 1
            optimizer.step()
    torch.testing.assert_close(part.param_groups[0]["d"], mine.param_groups[0]["d"], rtol=1e-9, atol=0)
    torch.testing.assert_close(part.param_groups[0]["params"], parameters[mesh.get_rank() :: 2], rtol=1e-9, atol=1e-9)


def refuses(mesh: DeviceMesh) -> None:
    shard, whole = distribute_tensor(torch.ones(4), mesh, [Shard(0)]), torch.ones(4)
    for tensors, settings, message in (
        ([shard, whole], {}, "a group has parameters in shards and whole ones"),
        ([shard], {"slice_p": 2}, "slice_p is 2; it must be 1 for parameters in shards"),
    ):
        parameters = [nn.Parameter(tensor) for tensor in tensors]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(InputError, match=message):
            GroupedProdigy(parameters, **settings).step()


@pytest.mark.parametrize("settings", SETTINGS)
def test_two_processes_are_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    in_processes(trains_as_one, tmp_path, settings)


def test_shards_that_cannot_be_seen(tmp_path: Path) -> None:
    in_processes(trains_in_hidden_shards, tmp_path)


def test_what_cannot_be_in_shards(tmp_path: Path) -> None:
    in_processes(refuses, tmp_path)
