import pytest
import torch

from lit_edm.modules import DiffusionModule, EDMModule, SDXLModule
from lit_edm.modules.diffusion import evaluating
from lit_edm.seeds import seed_of


def test_both_modules_are_all_that_callbacks_ask_for() -> None:
    assert DiffusionModule.__abstractmethods__ == {
        "encode", "denoise", "denoise_unconditionally", "decode", "sigma_range"
    }  # fmt: skip
    for module in (SDXLModule, EDMModule):
        assert issubclass(module, DiffusionModule)
        assert not module.__abstractmethods__


def test_seeds_of_neighbours_have_nothing_in_common() -> None:
    seeds = {seed_of(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert seed_of(1, 2) == seed_of(1, 2) != seed_of(2, 1)
    draws = torch.stack(
        [torch.randn(2000, generator=torch.Generator().manual_seed(seed_of(0, index))) for index in range(6)]
    )
    assert (torch.corrcoef(draws) - torch.eye(6)).abs().max() < 0.1


def test_modes_come_back_after_an_error() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).eval())
    seen = []
    with pytest.raises(ZeroDivisionError), evaluating(module):
        seen.append(1 / any(part.training for part in module.modules()))
    assert not seen
    assert [part.training for part in module.modules()] == [True, True, False]
