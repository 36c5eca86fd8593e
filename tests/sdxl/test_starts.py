import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lit_edm.sdxl import LoRA
from lit_edm.sdxl.starts import orthogonal, principal


class Network(nn.Module):
    """A layer that can be adapted."""

    def __init__(self, out_features: int = 12, in_features: int = 10) -> None:
        super().__init__()
        self.to_q = nn.Linear(in_features, out_features)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize(("out_features", "in_features"), [(12, 10), (7, 11)])
def test_the_same_factors_and_function_as_by_peft(start: str, out_features: int, in_features: int) -> None:
    torch.manual_seed(0)
    ours = Network(out_features, in_features)
    theirs = copy.deepcopy(ours)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["to_q"], init_lora_weights=start), theirs)  # type: ignore[arg-type]
    LoRA(3, 6.0, ("to_q",), init=start)(ours)  # type: ignore[arg-type]
    a, b = ours.to_q.lora_A["default"].weight, ours.to_q.lora_B["default"].weight
    torch.testing.assert_close(a, theirs.to_q.lora_A["default"].weight)
    torch.testing.assert_close(b, theirs.to_q.lora_B["default"].weight)

    x = torch.randn(5, in_features)
    for network in (ours, theirs):  # as if trained
        with torch.no_grad():
            network.to_q.lora_A["default"].weight += 1
            network.to_q.lora_B["default"].weight *= 2
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(a.grad, theirs.to_q.lora_A["default"].weight.grad)


def test_the_fast_start_is_near_the_exact_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 30) @ torch.diag(0.5 ** torch.arange(30))
    products = [b @ a for a, b in (principal(weight, 4, scale=2.0, exact=exact) for exact in (True, False))]
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-3)
    left = weight - 2 * products[0]
    assert torch.linalg.matrix_norm(left, 2) == pytest.approx(torch.linalg.svdvals(weight)[4].item(), rel=1e-3)


def test_orthogonal_factors_cancel() -> None:
    a, b = orthogonal(12, 10, rank=4)
    assert (a.shape, b.shape) == ((4, 10), (12, 4))
    assert (b @ a).abs().max() < 1e-6
    assert min(a.abs().max(), b.abs().max()) > 0.05
