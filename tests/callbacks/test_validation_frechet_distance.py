from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lit_edm.callbacks import ExponentialMovingAverage, ValidationFrechetDistance
from lit_edm.metrics import FrechetDistance
from lit_edm.seeds import seed_of

Make = Callable[..., Any]


def by_hand(module: Any, data: Any, features: nn.Module | None = None) -> float:
    data.setup("validate")
    metric = FrechetDistance(features)
    for index, example in enumerate(data.val_set):
        noise = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(seed_of(3, index)))
        metric.update(example["image"][None], real=True)
        metric.update(module.sample(noise[None], torch.tensor([example["label"]]), 4), real=False)
    return metric.compute().item()


@pytest.mark.parametrize("features", [None, nn.Sequential(nn.AvgPool2d(2), nn.Flatten())])
def test_is_that_of_samples_of_the_same_classes(
    pixels: Make, patches: Make, trainer: Make, features: nn.Module | None
) -> None:
    module, callback = pixels(), ValidationFrechetDistance(features, num_steps=4, seed=3)
    expected = by_hand(module, patches(), features)
    for _ in range(2):  # the second time as the first: the sets are emptied
        (logged,) = trainer(callback).validate(module, patches(), verbose=False)
        assert logged == pytest.approx({"val/frechet_distance": expected}, rel=1e-4)


def test_averaged_weights_are_compared(pixels: Make, patches: Make, trainer: Make) -> None:
    module, ema = pixels(), ExponentialMovingAverage(1e3, None)
    run = trainer(ValidationFrechetDistance(num_steps=4, seed=3), ema, max_steps=3)
    run.fit(module, patches())
    with ema.averaged(module):
        expected = by_hand(module, patches())
    assert run.callback_metrics["val/frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert by_hand(module, patches()) != pytest.approx(expected, rel=1e-4)
