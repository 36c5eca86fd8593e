from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from lit_edm.sdxl.placement import alone, at_hand, place_frozen

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@dataclass
class Values:
    """Stands for a tensor on a device that this machine may not have."""

    device: torch.device

    def to(self, device: torch.device) -> "Values":
        return Values(torch.device(device))


@dataclass
class Weights:
    """Stands for a parameter."""

    requires_grad: bool
    data: Values

    @property
    def device(self) -> torch.device:
        return self.data.device


class Network(NamedTuple):
    """Stands for a module; like one it can be a key."""

    parameters: Callable[[], list[Weights]]


@pytest.fixture
def network() -> Any:
    """One trained and two frozen parameters."""
    weights = [Weights(trained, Values(CPU)) for trained in (True, False, False)]
    return Network(lambda: weights)


def devices(network: Any) -> list[str]:
    return [parameter.device.type for parameter in network.parameters()]


def test_what_is_trained_stays(network: Any) -> None:
    place_frozen(network, "cuda")
    assert devices(network) == ["cpu", "cuda", "cuda"]


def test_comes_and_goes_also_past_an_error(network: Any) -> None:
    def fail_inside() -> None:
        with at_hand(network, GPU):
            assert devices(network) == ["cpu", "cuda", "cuda"]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert devices(network) == ["cpu"] * 3


def test_nothing_moves_that_is_there(network: Any) -> None:
    before = [parameter.data for parameter in network.parameters()]
    with at_hand(network, CPU):
        assert all(parameter.data is data for parameter, data in zip(network.parameters(), before, strict=True))


def test_others_leave_when_room_is_needed(network: Any) -> None:
    place_frozen(network, "cuda")
    seen = []

    def work(number: int) -> int:
        seen.append(devices(network))
        return number + 1

    with alone(work, [network]) as worker:
        assert devices(network) == ["cpu", "cuda", "cuda"], "not before"
        assert [worker(1), worker(2)] == [2, 3]
    assert seen == [["cpu"] * 3] * 2
    assert devices(network) == ["cpu", "cuda", "cuda"]


def test_nobody_leaves_for_nothing(network: Any) -> None:
    place_frozen(network, "cuda")
    before = [parameter.data for parameter in network.parameters()]
    with alone(print, [network]):
        pass
    assert all(parameter.data is data for parameter, data in zip(network.parameters(), before, strict=True))


def test_others_are_back_past_an_error(network: Any) -> None:
    place_frozen(network, "cuda")
    with pytest.raises(ZeroDivisionError), alone(lambda: 1 / 0, [network]) as worker:
        worker()
    assert devices(network) == ["cpu", "cuda", "cuda"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    layers = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)).to("cuda")
    place_frozen(layers, "cpu")
    assert [parameter.device.type for parameter in layers.parameters()] == ["cpu", "cpu", "cuda", "cuda"]
    with at_hand(layers, torch.device("cuda", 0)):
        layers(torch.ones(1, 2, device="cuda")).sum().backward()
    assert [parameter.device.type for parameter in layers.parameters()] == ["cpu", "cpu", "cuda", "cuda"]


def test_weights_moved_while_inferring_can_be_trained_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning validates in inference mode, whose tensors autograd refuses afterwards."""
    frozen = nn.Linear(2, 2).requires_grad_(False)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self.clone())  # as to another device
    with torch.inference_mode():
        place_frozen(frozen, "cpu")
    x = torch.ones(1, 2, requires_grad=True)
    frozen(x).square().sum().backward()
    assert x.grad is not None
