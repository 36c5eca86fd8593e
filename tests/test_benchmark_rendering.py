import runpy
from pathlib import Path

import pytest
import torch

from lit_edm.sdxl import DiffusersSampler

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts/benchmark_rendering.py"))


def test_both_render_the_same_and_are_timed(tiny: Path) -> None:
    sampler = DiffusersSampler("EulerDiscreteScheduler", 2)
    module, parameters = SCRIPT["module_of"](str(tiny), sampler)
    assert parameters == sum(value.numel() for value in module.denoiser.unet.state_dict().values())
    contenders = {
        "pipeline": SCRIPT["pipeline_renderer"](str(tiny), sampler, 16),
        "lit_edm": SCRIPT["renderer"](module, 16),
    }
    times = SCRIPT["alternating"](contenders, 3)
    assert {name: len(seconds) for name, seconds in times.items()} == {"pipeline": 3, "lit_edm": 3}
    assert all(seconds > 0 for each in times.values() for seconds in each)


def test_times_of_different_pictures_are_not_compared() -> None:
    contenders = {"pipeline": lambda seed: torch.ones(1), "lit_edm": lambda seed: torch.zeros(1)}
    with pytest.raises(RuntimeError, match="the pictures differ"):
        SCRIPT["alternating"](contenders, 1)
