from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_edm.callbacks import ValidationImages
from lit_edm.callbacks.sheet import contact_sheet, to_pictures
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.edm import (
    DPMSolverSampler,
    EulerSampler,
    HeunSampler,
    Sampler,
    guided,
    karras_sigmas,
    sample_dpmpp_2m,
    sample_heun,
)
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.modules.prior import blank_batch
from lit_edm.sdxl import LoRA
from lit_edm.sdxl.schedulers import DiffusersSampler

PROMPTS = ["TOK, a red apple", "TOK, a rocket"]


def fit(tiny: Path, icons: Path, root: Path, callback: ValidationImages, **settings: Any) -> SDXLModule:
    module = SDXLModule(str(tiny), tokens={"TOK": 1}, adapter=LoRA(rank=2))
    trainer = Trainer(
        **({"max_steps": 4, "logger": False} | settings),
        callbacks=[callback],
        accelerator="cpu",
        default_root_dir=root,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, CaptionedImagesDataModule(icons, resolution=16, batch_size=4))
    return module


def test_pictures_before_during_and_after(tiny: Path, icons: Path, tmp_path: Path) -> None:
    callback = ValidationImages(PROMPTS, every_n_steps=2, resolution=16, sampler=HeunSampler(2))
    fit(tiny, icons, tmp_path, callback, max_steps=5)
    folders = sorted(path.name for path in (tmp_path / "images").iterdir() if path.is_dir())
    assert folders == ["step_000000", "step_000002", "step_000004", "step_000005"]
    for folder in folders:
        for name in ("00.png", "01.png"):
            with Image.open(tmp_path / "images" / folder / name) as picture:
                assert picture.size == (16, 16)
    assert callback.pictures == [tmp_path / "images/step_000005" / name for name in ("00.png", "01.png")]
    before, after = ((tmp_path / "images" / f / "00.png").read_bytes() for f in (folders[0], folders[-1]))
    assert before != after
    with Image.open(tmp_path / "images/before_after.png") as sheet:
        assert sheet.width > 2 * 256
        assert sheet.height > 2 * 256


def test_accumulated_batches_are_one_step(tiny: Path, icons: Path, tmp_path: Path) -> None:
    callback = ValidationImages(PROMPTS[:1], every_n_steps=1, resolution=16, sampler=HeunSampler(1))
    renderings = []
    callback.log_images = lambda trainer, images: renderings.append(trainer.global_step)  # type: ignore[method-assign]
    fit(tiny, icons, tmp_path, callback, max_steps=2, accumulate_grad_batches=2)
    assert renderings == [0, 1, 2]


def test_noise_is_fixed_and_training_undisturbed(tiny: Path, icons: Path, tmp_path: Path) -> None:
    callback = ValidationImages(PROMPTS, resolution=16, sampler=HeunSampler(2))
    module = SDXLModule(str(tiny), tokens={"TOK": 1})
    module.configure_model()
    modes = {name: part.training for name, part in module.named_modules()}
    assert len(set(modes.values())) == 2
    torch.manual_seed(1)
    first = callback.render(module)
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()).equal(after), "rendering drew from the global generator"
    assert callback.render(module).equal(first)
    assert not first[0].equal(first[1])
    assert {name: part.training for name, part in module.named_modules()} == modes


def test_rendering_is_heun_over_the_bases_noise_levels(tiny: Path, tiny_edm: Path) -> None:
    for base in (tiny, tiny_edm):
        module = SDXLModule(str(base))
        module.configure_model()
        callback = ValidationImages(["x"], resolution=16, sampler=HeunSampler(3), guidance_scale=2.0, seed=7)
        batch = {
            "caption": ["x"],
            "image": torch.zeros(1, 3, 16, 16),
            "original_size": torch.tensor([[16, 16]]),
            "crop_top_left": torch.tensor([[0, 0]]),
        }
        with torch.no_grad():
            cond, uncond = module.denoise(batch), module.denoise_unconditionally(batch)  # type: ignore[arg-type]
        sigmas = karras_sigmas(3, *module.sigma_range)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7)) * sigmas[0]
        latents = sample_heun(lambda x, s: uncond(x, s) + 2 * (cond(x, s) - uncond(x, s)), noise, sigmas)  # noqa: B023
        torch.testing.assert_close(callback.render(module), module.decode(latents), rtol=1e-3, atol=1e-4)


def test_sampler_and_guidance_interval_are_those_given(tiny: Path) -> None:
    module = SDXLModule(str(tiny))
    module.configure_model()
    settings: dict[str, Any] = {"resolution": 16, "guidance_scale": 4.0, "guidance_interval": (0.5, 5.0)}
    callback = ValidationImages(["x"], sampler=DPMSolverSampler(4, rho=3.0), **settings)
    batch = blank_batch(["x"], (16, 16), module.device)
    sigmas = karras_sigmas(4, *module.sigma_range, rho=3.0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    with torch.no_grad():
        denoise = guided(module.denoise(batch), module.denoise_unconditionally(batch), 4.0, 0.5, 5.0)
        expected = module.decode(sample_dpmpp_2m(denoise, noise, sigmas))
    torch.testing.assert_close(callback.render(module), expected, rtol=1e-3, atol=1e-4)
    everywhere = ValidationImages(["x"], sampler=DPMSolverSampler(4, rho=3.0), **settings | {"guidance_interval": None})
    assert not torch.allclose(everywhere.render(module), expected, atol=1e-3)


def test_noise_added_on_the_way_is_the_seeds(tiny: Path) -> None:
    """Neither the global generator's, nor such that a prompt would start from other noise with another sampler."""
    module = SDXLModule(str(tiny))
    module.configure_model()
    starts: list[torch.Tensor] = []

    class Watched(Sampler):
        def __call__(self, denoise: Any, noise: torch.Tensor, *levels: Any) -> torch.Tensor:
            starts.append(noise)
            return HeunSampler(2, s_churn=2.0)(denoise, noise, *levels)

        @property
        def evaluations(self) -> int:
            return 3

    churned = ValidationImages(PROMPTS, resolution=16, sampler=Watched())
    torch.manual_seed(1)
    first = churned.render(module)
    torch.manual_seed(2)
    assert churned.render(module).equal(first)
    generator = torch.Generator().manual_seed(0)
    assert all(noise.equal(torch.randn(1, 4, 8, 8, generator=generator)) for noise in starts[:2])


def test_yaml_that_names_another_sampler_has_its_number_of_steps() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    config = parser.parse_object(
        {
            "callbacks": [
                {
                    "class_path": "lit_edm.callbacks.ValidationImages",
                    "init_args": {
                        "prompts": ["x"],
                        "sampler": {"class_path": "DPMSolverSampler"},
                        "guidance_interval": [0.2, 5],
                    },
                }
            ]
        }
    )
    built = parser.instantiate(parser.parse_string(parser.dump(config))).callbacks[0]
    assert built.sampler == DPMSolverSampler(50)
    assert built.guidance_interval == (0.2, 5.0)
    assert ValidationImages(["x"]).sampler == HeunSampler(20)


def test_pictures_reach_tensorboard(tiny: Path, icons: Path, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    pictures = ValidationImages(PROMPTS, resolution=16, sampler=EulerSampler(1))
    fit(tiny, icons, tmp_path, pictures, logger=logger, max_steps=1)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["validation/00", "validation/01"]
    assert [event.step for event in events.Images("validation/00")] == [0, 1]


def test_no_prompt() -> None:
    with pytest.raises(InputError, match=r"ValidationImages\.prompts is empty"):
        ValidationImages([])


@pytest.mark.parametrize("interval", [(2.0, 1.0), (1.0, 1.0), (-1.0, 1.0)])
def test_guidance_nowhere(interval: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=r"ValidationImages\.guidance_interval is .*; it must be 0 <= low < high"):
        ValidationImages(["x"], guidance_interval=interval)


class TestSheet:
    def test_pixels_round_to_the_nearest_and_clamp(self) -> None:
        values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).expand(1, 3, 1, 5)
        assert np.asarray(to_pictures(values)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]

    def test_pictures_are_where_they_belong(self) -> None:
        colors = ["red", "lime", "blue", "black"]
        pictures = [Image.new("RGB", (4, 4), color) for color in colors]
        sheet = contact_sheet({"before": pictures[:2], "after": pictures[2:]}, ["a", "a long caption " * 9], side=64)
        seen = [count_color for _, count_color in sorted(sheet.getcolors(10**6), reverse=True)]
        expected = {(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)}
        assert expected <= set(seen[:6])
        where = {color: np.argwhere((np.asarray(sheet) == color).all(-1)) for color in expected - {(0, 0, 0)}}
        red, lime, blue = (where[c].mean(0) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
        assert red[0] == lime[0] < blue[0]
        assert red[1] == blue[1] < lime[1]
        assert all(len(points) == 64 * 64 for points in where.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 17}, "resolution is 17; give a multiple of 2, the VAE's factor, such as 16"),
        ({"resolution": 0}, "resolution is 0; give a multiple of 2, the VAE's factor, such as 2"),
        ({"sampler": DiffusersSampler("EDMEulerScheduler")}, "EDMEulerScheduler is not for a base with timesteps"),
    ],
)
def test_what_the_base_cannot_render_is_told_before_it_is_loaded(
    tiny: Path, icons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(SDXLModule, "configure_model", lambda self: pytest.fail("weights would be loaded now"))
    with pytest.raises(InputError, match=message):
        fit(tiny, icons, tmp_path, ValidationImages(PROMPTS, **({"resolution": 16} | settings)))
