"""The long tensors behind an optimizer's state, what a step costs, and what checkpoints hold."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_edm.optim import GroupedProdigy
from lit_edm.optim.flat import KINDS, runs_of


class Operations(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def weights(count: int, device: str = "cpu", **settings: Any) -> tuple[list[nn.Parameter], GroupedProdigy]:
    """Makes parameters of different shapes that have gradients, and their optimizer."""
    made = [nn.Parameter(torch.full((2, 1 + index % 5), 1.0 + index, device=device)) for index in range(count)]
    for index, parameter in enumerate(made):
        parameter.grad = torch.full_like(parameter, 0.1 * (-1) ** index)
    return made, GroupedProdigy(made, d0=1e-2, **settings)


def steps(optimizer: GroupedProdigy, count: int) -> None:
    for _ in range(count):
        optimizer.step()


def storages(optimizer: GroupedProdigy) -> set[int]:
    tensors = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1, "use_bias_correction": True, "safeguard_warmup": True, "growth_rate": 1.02},
        {"weight_decay": 0.1, "decouple": False, "betas": (0.0, 0.9), "slice_p": 2},
    ],
)
def test_a_step_is_a_few_operations_and_waits_for_nothing(settings: dict[str, Any]) -> None:
    """On the meta device, where nothing can be looked at; from the first step on."""
    counts = []
    for number in (3, 300):
        _, optimizer = weights(number, "meta", **settings)
        optimizer.step()
        with Operations() as operations:
            optimizer.step()
        counts.append(operations.count)
    assert counts[0] == counts[1] < 80


def test_states_are_parts_of_four_tensors_in_the_form_of_prodigyopt() -> None:
    made, optimizer = weights(10)
    starts = [parameter.detach().clone() for parameter in made]
    steps(optimizer, 3)
    assert len(storages(optimizer)) == 4
    for parameter, start in zip(made, starts, strict=True):
        entry = optimizer.state[parameter]
        assert entry.keys() == {"step", *KINDS}
        assert entry["step"] == 3
        assert entry["exp_avg"].shape == entry["exp_avg_sq"].shape == parameter.shape
        assert entry["s"].shape == (parameter.numel(),)
        assert entry["p0"].equal(start.flatten())


def test_a_step_keeps_little_room_to_work_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensors as long as what is stepped at once, for all of the group."""
    monkeypatch.setattr("lit_edm.optim.flat.most_at_once", lambda device: 30)
    _, optimizer = weights(20)
    optimizer.step()
    stretches = optimizer._flat[0].stretches([True] * 20)
    assert sum(len(stretch.gradient) for stretch in stretches) == 20 * 6
    assert max(len(stretch.gradient) for stretch in stretches) <= 30
    rooms = {room.untyped_storage().data_ptr(): room for s in stretches for room in (s.gradient, s.value)}
    assert [room.untyped_storage().nbytes() for room in rooms.values()] == [4 * 30] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_stepped_in_single(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    optimizer = GroupedProdigy([parameter, single := nn.Parameter(torch.ones(3))], d0=1e-2)
    single.grad = torch.ones_like(single)
    steps(optimizer, 3)
    assert {value.dtype for value in optimizer.state[parameter].values() if isinstance(value, Tensor)} == {
        torch.float32
    }
    torch.testing.assert_close(parameter.detach(), single.detach().to(dtype), rtol=0.01, atol=0)


class TestWhatOthersDo:
    """To the state, or to the parameters: the next step goes on with that."""

    def replace(self, optimizer: GroupedProdigy) -> None:
        """As strategies do who move a state to another device."""
        for entry in optimizer.state.values():
            entry.update({key: value.clone() for key, value in entry.items() if isinstance(value, Tensor)})

    def load(self, optimizer: GroupedProdigy) -> None:
        optimizer.load_state_dict(optimizer.state_dict())

    def copy(self, optimizer: GroupedProdigy) -> None:
        optimizer.__setstate__(optimizer.__getstate__())

    @pytest.mark.parametrize("change", [replace, load, copy])
    def test_the_same_values_elsewhere(self, change: Callable[..., None]) -> None:
        (whole, one), (changed, other) = weights(5), weights(5)
        steps(one, 6)
        for _ in range(3):
            steps(other, 2)
            change(self, other)
        steps(one, 1)
        steps(other, 1)
        assert all(a.equal(b) for a, b in zip(whole, changed, strict=True))
        for a, b in zip(whole, changed, strict=True):
            torch.testing.assert_close(one.state[a], other.state[b], rtol=0, atol=0)
        assert len(storages(other)) == 4

    def test_other_values(self) -> None:
        made, optimizer = weights(5)
        steps(optimizer, 2)
        before = made[1].detach().clone()
        for parameter in made:
            parameter.grad = torch.zeros_like(parameter)
            optimizer.state[parameter]["exp_avg"].zero_()
        optimizer.step()
        assert made[1].equal(before)

    def test_a_state_that_is_cleared_begins_anew(self) -> None:
        made, optimizer = weights(3)
        steps(optimizer, 2)
        optimizer.state.clear()
        optimizer.step()
        assert [optimizer.state[parameter]["step"] for parameter in made] == [1] * 3
        assert not optimizer.state[made[0]]["p0"].eq(1.0).any(), "it began elsewhere"

    def test_parameters_in_another_precision(self) -> None:
        made, optimizer = weights(3)
        steps(optimizer, 2)
        for parameter in made:
            parameter.data, gradient = parameter.data.double(), parameter.grad
            parameter.grad = None if gradient is None else gradient.double()
        kept = optimizer.state[made[0]]["exp_avg_sq"].double()
        optimizer.step()
        assert optimizer.state[made[0]]["exp_avg_sq"].dtype == torch.float64
        assert (optimizer.state[made[0]]["exp_avg_sq"] > kept).all()

    def test_a_mean_from_now_on(self) -> None:
        made, optimizer = weights(3, betas=(0.0, 0.9))
        steps(optimizer, 2)
        assert "exp_avg" not in optimizer.state[made[0]]
        optimizer.param_groups[0]["betas"] = (0.9, 0.9)
        optimizer.step()
        assert optimizer.state[made[0]]["exp_avg"].any()


class TestSize:
    """A view is saved with all of what it is a view of."""

    def bytes_of(self, count: int, large: list[nn.Parameter]) -> int:
        return count * sum(parameter.nbytes for parameter in large)

    def made(self) -> tuple[list[nn.Parameter], GroupedProdigy]:
        large = [nn.Parameter(torch.ones(64, 64)) for _ in range(20)]
        for parameter in large:
            parameter.grad = torch.ones_like(parameter)
        optimizer = GroupedProdigy([{"params": large[:10]}, {"params": large[10:]}])
        optimizer.step()
        return large, optimizer

    def test_of_a_checkpoint_is_that_of_the_state(self, tmp_path: Path) -> None:
        large, optimizer = self.made()
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        assert (tmp_path / "state.pt").stat().st_size == pytest.approx(self.bytes_of(4, large), rel=0.05)

    def test_of_a_part_is_at_most_that_of_its_group(self, tmp_path: Path) -> None:
        large, optimizer = self.made()
        torch.save(optimizer.state_dict()["state"][3], tmp_path / "state.pt")
        assert (tmp_path / "state.pt").stat().st_size < 1.05 * self.bytes_of(4, large[:10])

    def test_of_a_copy(self) -> None:
        large, optimizer = self.made()
        assert len(pickle.dumps(optimizer)) == pytest.approx(self.bytes_of(5, large), rel=0.5)


@pytest.mark.parametrize(
    ("stepped", "limit", "runs"),
    [
        ([1, 1, 1, 1], 100, [range(4)]),
        ([1, 1, 0, 1], 100, [range(2), range(3, 4)]),
        ([0, 1, 1, 0], 100, [range(1, 3)]),
        ([1, 1, 1, 1], 5, [range(2), range(2, 3), range(3, 4)]),
        ([1, 1, 1, 1], 1, [range(1), range(1, 2), range(2, 3), range(3, 4)]),
    ],
)
def test_runs(stepped: list[int], limit: int, runs: list[range]) -> None:
    """Of sizes 2, 3, 4 and 6."""
    assert runs_of([bool(here) for here in stepped], [2, 3, 4, 6], limit) == runs
