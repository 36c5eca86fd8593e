from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lit_edm.callbacks import ExponentialMovingAverage, SampleSheet
from lit_edm.callbacks.sheet import contact_sheet, to_pictures

Make = Callable[..., Any]


def test_sheets_before_during_and_after(pixels: Make, patches: Make, trainer: Make, tmp_path: Path) -> None:
    sheet = SampleSheet(every_n_steps=2, samples=5, num_steps=2, side=20)
    trainer(sheet, max_steps=5).fit(pixels(), patches())
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == [f"step_{step:06d}.png" for step in (0, 2, 4, 5)]
    with Image.open(files[0]) as first, Image.open(files[-1]) as last:
        assert first.size[0] >= 5 * 20
        assert first.size[1] >= 3 * 20
        assert first.size == last.size
        assert first.tobytes() != last.tobytes()
    assert sheet.titles == ["dark", "grey", "light"]


def test_samples_are_of_each_class_from_fixed_noise(pixels: Make) -> None:
    module, sheet = pixels(), SampleSheet(samples=2, num_steps=3, seed=4)
    torch.manual_seed(0)
    images = sheet.render(module)
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0)), "the global generator is left"
    noise = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    assert images.equal(module.sample(noise, torch.tensor([0, 0, 1, 1, 2, 2]), 3))
    assert sheet.render(module).equal(images)


def test_guidance_reaches_the_sampler(pixels: Make) -> None:
    module = pixels(label_dropout=0.1)
    one, three = (SampleSheet(samples=1, num_steps=2, guidance_scale=scale).render(module) for scale in (1.0, 3.0))
    assert not one.allclose(three)


def test_rows_without_names_and_without_classes(pixels: Make, patches: Make, trainer: Make, tmp_path: Path) -> None:
    images = DataLoader(patches().read()[0], 3)
    for module, titles in ((pixels(), ["0", "1", "2"]), (pixels(num_classes=None), [""])):
        sheet = SampleSheet(samples=1, num_steps=1)
        trainer(sheet, max_steps=1).fit(module, images)
        assert sheet.titles == titles
        assert len(sheet.render(module)) == len(titles)


def test_averaged_weights_are_sampled(pixels: Make, patches: Make, trainer: Make, tmp_path: Path) -> None:
    module = pixels(optimizer=lambda params: torch.optim.Adam(params, lr=0.01))
    ema, sheet = ExponentialMovingAverage(1e3, None), SampleSheet(samples=1, num_steps=2)
    trainer(ema, sheet).fit(module, patches())
    with ema.averaged(module):
        expected = sheet.sheet(to_pictures(sheet.render(module)))
    with Image.open(tmp_path / "samples/step_000004.png") as written:
        assert written.tobytes() == expected.tobytes()
    assert sheet.sheet(to_pictures(sheet.render(module))).tobytes() != expected.tobytes()


def test_sheet_reaches_tensorboard(pixels: Make, patches: Make, trainer: Make, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(SampleSheet(samples=1, num_steps=1), logger=logger, max_steps=1).fit(pixels(), patches())
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("samples/00")] == [0, 1]


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_pictures_stay_grey_and_pixels_square(channels: int) -> None:
    (picture,) = to_pictures(torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2).expand(1, channels, 2, 2))
    sheet = np.asarray(contact_sheet({"": [picture]}, [""], side=10, resample=Image.Resampling.NEAREST))
    black = np.argwhere((sheet == 0).all(-1))
    assert len(black) == 50
    assert np.ptp(black, axis=0).tolist() == [9, 4]
