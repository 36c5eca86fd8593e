"""The schedules of diffusers' scripts are the reference."""

from typing import Any

import pytest
import torch

from lit_edm.errors import InputError
from lit_edm.optim import WarmupSchedule


class TestWarmupSchedule:
    @pytest.mark.parametrize(
        ("name", "settings", "theirs"),
        [
            ("constant", {}, {}),
            ("constant_with_warmup", {"warmup_steps": 5}, {}),
            ("linear", {"warmup_steps": 5, "decay": "linear", "total_steps": 20}, {}),
            ("cosine", {"warmup_steps": 5, "decay": "cosine", "total_steps": 20}, {}),
            ("cosine", {"decay": "cosine", "total_steps": 20}, {}),
            (
                "cosine_with_restarts",
                {"warmup_steps": 4, "decay": "cosine", "total_steps": 20, "cycles": 3},
                {"num_cycles": 3},
            ),
            (
                "polynomial",
                {"warmup_steps": 5, "decay": "polynomial", "total_steps": 20, "power": 2.0, "final": 1e-7 / 1e-3},
                {"power": 2.0},
            ),
        ],
    )
    def test_is_that_of_diffusers(self, name: str, settings: dict[str, Any], theirs: dict[str, Any]) -> None:
        from diffusers.optimization import get_scheduler

        rates = []
        for make in (
            lambda optimizer: WarmupSchedule(optimizer, **settings),
            lambda optimizer: get_scheduler(
                name, optimizer, num_warmup_steps=settings.get("warmup_steps", 0), num_training_steps=20, **theirs
            ),
        ):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
            schedule, seen = make(optimizer), []
            for _ in range(21):  # after the last step theirs rise again
                seen.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
            rates.append(seen)
        assert rates[0] == pytest.approx(rates[1], abs=1e-12)

    @pytest.mark.parametrize(
        "settings",
        [
            {"decay": "cosine"},
            {"decay": "linear", "warmup_steps": 5, "total_steps": 5},
            {"warmup_steps": -1},
            {"cycles": 0},
            {"final": 1.5},
            {"power": 0.0},
        ],
    )
    def test_settings_out_of_range(self, settings: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="WarmupSchedule"):
            WarmupSchedule(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), **settings)
