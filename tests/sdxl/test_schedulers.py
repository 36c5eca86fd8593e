"""A scheduler of diffusers draws what it draws in diffusers' own pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from lit_edm.edm import EDMPreconditioning, EpsPreconditioning, HeunSampler, Preconditioning, VelocityPreconditioning
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.modules.prior import blank_batch
from lit_edm.sdxl import DiffusersSampler, SDXLCheckpoint
from lit_edm.sdxl.schedulers import for_base, level

PROMPTS = ["a red apple", "a rocket on a blue background"]
SEEDS = [3, 4]


def pixels_of_pipeline(folder: Path, sampler: DiffusersSampler, negative: str | None = None) -> torch.Tensor:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = type(for_base(sampler, SDXLCheckpoint(str(folder))).make_scheduler()).from_config(  # type: ignore[attr-defined]
        pipeline.scheduler.config, **sampler.settings
    )
    pixels: Any = pipeline(
        PROMPTS,
        negative_prompt=None if negative is None else [negative] * len(PROMPTS),
        height=16,
        width=24,
        num_inference_steps=sampler.num_steps,
        guidance_scale=3.0,
        eta=sampler.eta,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
    ).images
    return pixels


def pixels_of_module(folder: Path, sampler: DiffusersSampler, negative: str | None = None) -> torch.Tensor:
    module = SDXLModule(str(folder))
    module.configure_model()
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    noise = torch.stack([torch.randn(4, 8, 12, generator=generator) for generator in generators])
    batch = blank_batch(PROMPTS, (16, 24), module.device)
    pixels = module.sample(batch, noise, sampler, 3.0, generator=generators, negative_prompt=negative)
    return (pixels / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(
    "sampler",
    [
        DiffusersSampler("EulerDiscreteScheduler", 5),
        DiffusersSampler("EulerDiscreteScheduler", 5, {"use_karras_sigmas": True}),
        DiffusersSampler("EulerDiscreteScheduler", 5, {"timestep_spacing": "trailing"}),
        DiffusersSampler("EulerAncestralDiscreteScheduler", 5),
        DiffusersSampler("diffusers.DDIMScheduler", 5),
        DiffusersSampler("DDIMScheduler", 5, eta=0.7),
        DiffusersSampler("DDPMScheduler", 5),
        DiffusersSampler("PNDMScheduler", 5),
        DiffusersSampler("HeunDiscreteScheduler", 4),
        DiffusersSampler("KDPM2AncestralDiscreteScheduler", 4),
        DiffusersSampler("DPMSolverMultistepScheduler", 6),
        DiffusersSampler("DPMSolverMultistepScheduler", 5, {"algorithm_type": "sde-dpmsolver++"}),
        DiffusersSampler("DPMSolverMultistepScheduler", 6, {"use_karras_sigmas": True, "final_sigmas_type": "zero"}),
        DiffusersSampler("UniPCMultistepScheduler", 5),
        DiffusersSampler("LCMScheduler", 3),
    ],
    ids=lambda sampler: f"{sampler.scheduler}{sampler.settings or ''}{sampler.eta or ''}",
)
@pytest.mark.parametrize("base", ["tiny", "tiny_v"])
def test_pixels_of_the_pipeline(base: str, sampler: DiffusersSampler, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    expected = pixels_of_pipeline(folder, sampler)
    torch.testing.assert_close(pixels_of_module(folder, sampler), expected, rtol=0, atol=1e-4)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("scheduler", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_pixels_of_the_pipeline_on_an_edm_base(tiny_edm: Path, scheduler: str) -> None:
    sampler = DiffusersSampler(scheduler, 6)
    expected = pixels_of_pipeline(tiny_edm, sampler)
    torch.testing.assert_close(pixels_of_module(tiny_edm, sampler), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("negative", ["", "blurry, a green pear"])
def test_a_negative_prompt_is_the_pipelines(tiny: Path, negative: str) -> None:
    sampler = DiffusersSampler("EulerDiscreteScheduler", 4)
    expected = pixels_of_pipeline(tiny, sampler, negative)
    torch.testing.assert_close(pixels_of_module(tiny, sampler, negative), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(pixels_of_pipeline(tiny, sampler), expected, atol=1e-3)


@pytest.mark.parametrize(
    "preconditioning", [EDMPreconditioning(0.7), EpsPreconditioning(), VelocityPreconditioning()], ids=repr
)
def test_levels_are_those_of_the_networks_inputs(preconditioning: Preconditioning) -> None:
    sigma = torch.tensor([0.05, 1.3, 9.0], dtype=torch.float64)
    torch.testing.assert_close(level(preconditioning, preconditioning(sigma).c_noise), sigma, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("scheduler", "evaluations"), [("EulerDiscreteScheduler", 5), ("HeunDiscreteScheduler", 9), ("PNDMScheduler", 14)]
)
def test_evaluations_are_those_made(tiny: Path, scheduler: str, evaluations: int) -> None:
    sampler, calls = DiffusersSampler(scheduler, 5, base=SDXLCheckpoint(str(tiny))), []

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(sigma)
        return x / (1 + sigma[:, None, None, None] ** 2)

    sampler(denoise, torch.randn(2, 4, 4, 4), 0.03, 14.6)
    assert len(calls) == sampler.evaluations == evaluations


def test_the_base_is_the_modules_unless_given() -> None:
    base, other = SDXLCheckpoint("base"), SDXLCheckpoint("other")
    assert for_base(DiffusersSampler(), base) == DiffusersSampler(base=base)
    assert for_base(DiffusersSampler(base=other), base) == DiffusersSampler(base=other)
    assert for_base(HeunSampler(), base) == HeunSampler()
    with pytest.raises(InputError, match=r"DiffusersSampler\.base is not given"):
        DiffusersSampler().make_scheduler()


class TestMistakes:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"scheduler": "EulerScheduler"}, "there is no EulerScheduler; write a name that diffusers has"),
            ({"scheduler": "nowhere.EulerScheduler"}, "there is no nowhere.EulerScheduler"),
            ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "is not for a base with timesteps; choose another"),
            ({"scheduler": "EDMEulerScheduler"}, "is not for a base with timesteps; choose another"),
            ({"scheduler": "UNet2DConditionModel"}, "is not for a base with timesteps; choose another"),
            ({"settings": {"karras": True}}, "EulerDiscreteScheduler has no karras; it has num_train_timesteps, beta_"),
            ({"settings": {"beta_schedule": "x"}}, "settings: EulerDiscreteScheduler says: x is not implemented"),
        ],
    )
    def test_one_line(self, tiny: Path, settings: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError) as error:
            DiffusersSampler(**settings, base=SDXLCheckpoint(str(tiny))).make_scheduler()
        assert said in str(error.value)
        assert "\n" not in str(error.value)

    def test_timesteps_on_an_edm_base(self, tiny_edm: Path) -> None:
        with pytest.raises(InputError, match="EulerDiscreteScheduler is not for an EDM-native base; choose another"):
            DiffusersSampler(base=SDXLCheckpoint(str(tiny_edm))).make_scheduler()

    @pytest.mark.parametrize("settings", [{"num_steps": 0}, {"eta": 1.5}, {"eta": -0.1}])
    def test_out_of_range(self, settings: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=rf"DiffusersSampler\.{next(iter(settings))} must be"):
            DiffusersSampler(**settings)
