from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_edm.edm import Denoise, guided
from lit_edm.modules import SDXLModule
from lit_edm.modules.prior import blank_batch
from lit_edm.sdxl.guidance import guided_at_once

SIGMA = torch.tensor([0.1, 1.0, 5.0])


@pytest.fixture(scope="module")
def parts(tiny: Path) -> tuple[SDXLModule, Denoise, Denoise, Tensor]:
    """A module, its D and D_u for three prompts, and something to denoise."""
    module = SDXLModule(str(tiny)).eval()
    module.configure_model()
    batch = blank_batch(["a", "b c", "d"], (16, 16), module.device)
    with torch.no_grad():
        conditional, unconditional = module.denoise(batch), module.denoise_unconditionally(batch)
    return module, conditional, unconditional, torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("interval", [(), (0.5, 2.0), (10.0, 20.0)])
def test_both_halves_at_once_are_the_same(parts: tuple, scale: float, interval: tuple[float, ...]) -> None:
    module, conditional, unconditional, x = parts
    given, negative = conditional.keywords["conditioning"], unconditional.keywords["conditioning"]
    with torch.no_grad():
        found = guided_at_once(module.denoiser, given, negative, scale, *interval)(x, SIGMA)
        expected = guided(conditional, unconditional, scale, *interval)(x, SIGMA)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


GUIDED, NOT = [6], [3]


@pytest.mark.parametrize(
    ("scale", "interval", "examples"),
    [(4.0, (), GUIDED), (4.0, (0.5, 2.0), GUIDED), (4.0, (10.0, 20.0), NOT), (1.0, (), NOT)],
)
def test_the_network_runs_once(parts: tuple, scale: float, interval: tuple[float, ...], examples: list[int]) -> None:
    module, conditional, unconditional, x = parts
    given, negative = conditional.keywords["conditioning"], unconditional.keywords["conditioning"]
    seen: list[int] = []
    hook = module.denoiser.unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        guided_at_once(module.denoiser, given, negative, scale, *interval)(x, SIGMA)
    hook.remove()
    assert seen == examples
