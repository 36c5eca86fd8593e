"""What the loss costs outside of the network, counted against a step of the real SDXL UNet."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_edm.edm import (
    EDMLoss,
    EDMPreconditioning,
    EDMWeighting,
    EpsPreconditioning,
    LearnedWeighting,
    LogNormal,
    MinSNRWeighting,
    Preconditioning,
    UniformTimesteps,
)

UNET_PARAMETERS = 2_567_463_684  # SDXL's, as tests/sdxl/test_adapters.py counts them
UNET_LAUNCHES = 11_552  # kernels of its forward and backward pass with rank-8 LoRA, eager


class Traffic(TorchDispatchMode):
    """Counts the operations on a device and the bytes they read and write, as if nothing were ever in a cache."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [
            t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor) and t.device.type == self.device
        ]
        self.operations += bool(tensors)
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("loss", "preconditioning"),
    [
        (EDMLoss(UniformTimesteps(), MinSNRWeighting(5.0, 1.0)), EpsPreconditioning()),
        (EDMLoss(LogNormal(), EDMWeighting()), EDMPreconditioning()),
        (EDMLoss(LogNormal(), LearnedWeighting().to("meta")), EDMPreconditioning()),
    ],
    ids=["eps", "edm", "learned"],
)
def test_under_two_percent_of_a_step_of_sdxl(batch_size: int, loss: EDMLoss, preconditioning: Preconditioning) -> None:
    """On the meta device, where nothing can be looked at: so the host never waits for it, either.

    A step of the UNet reads each of its weights in bf16 at least twice, forward and backward, whatever else it does:
    the bytes it moves, and so its time where memory is the limit, are at least these.
    """
    clean = torch.empty(batch_size, 4, 128, 128, device="meta")
    scale = torch.ones((), device="meta", requires_grad=True)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return preconditioning.denoise(lambda x, c_noise: x * scale, x, sigma)

    with Traffic("meta") as traffic:
        loss(denoise, clean).mean().backward()
    assert scale.grad is not None
    assert 0 < traffic.bytes < 0.02 * (2 * 2 * UNET_PARAMETERS)
    assert 0 < traffic.operations < 0.02 * UNET_LAUNCHES
