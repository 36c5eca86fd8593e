import pytest
import torch
from prodigyopt import Prodigy

from lit_edm.errors import InputError
from lit_edm.modules.trial import try_optimizer
from lit_edm.optim import GroupedProdigy, WarmupSchedule

GROUPS = ["unet", "embeddings"]
SETTINGS = {"unet": {}, "embeddings": {"lr": 0.5, "weight_decay": None}}
ALIKE = {"unet": {}, "embeddings": {"lr": None}}


def test_what_is_right_passes() -> None:
    try_optimizer(None, None, GROUPS, SETTINGS)
    try_optimizer(torch.optim.AdamW, lambda made: WarmupSchedule(made, 10), GROUPS, SETTINGS)
    try_optimizer(GroupedProdigy, None, GROUPS, SETTINGS)
    try_optimizer(Prodigy, None, GROUPS, ALIKE)


def test_what_is_refused_is_a_mistake_under_its_key() -> None:
    with pytest.raises(InputError, match=r"^model\.init_args\.optimizer: Invalid learning rate: -1"):
        try_optimizer(lambda groups: torch.optim.AdamW(groups, lr=-1.0), None, GROUPS, SETTINGS)
    with pytest.raises(InputError, match=r"^model\.init_args\.lr_scheduler: .*total_steps"):
        try_optimizer(torch.optim.AdamW, lambda made: torch.optim.lr_scheduler.OneCycleLR(made, 1.0), GROUPS, SETTINGS)


def test_our_own_refusals_stay_as_they_are() -> None:
    with pytest.raises(InputError, match=r"^GroupedProdigy\.lr of embeddings is -1"):
        try_optimizer(GroupedProdigy, None, GROUPS, {"unet": {}, "embeddings": {"lr": -1.0}})
    with pytest.raises(InputError, match=r"^WarmupSchedule\.total_steps is None"):
        try_optimizer(torch.optim.AdamW, lambda made: WarmupSchedule(made, 10, "cosine"), GROUPS, SETTINGS)


def test_several_rates_for_an_optimizer_that_takes_one() -> None:
    with pytest.raises(InputError, match=r"rates \[0\.5, 1\.0\] are given, but prodigyopt\.Prodigy .* GroupedProdigy"):
        try_optimizer(Prodigy, None, GROUPS, SETTINGS)


def test_draws_nothing() -> None:
    before = torch.get_rng_state()
    try_optimizer(torch.optim.AdamW, None, GROUPS, SETTINGS)
    assert torch.get_rng_state().equal(before)
