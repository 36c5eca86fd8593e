from pathlib import Path

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from lit_edm.edm import EDMPreconditioning, TimestepSchedule
from lit_edm.sdxl import Conditioning, SDXLCheckpoint, SDXLDenoiser

CONDITIONING = Conditioning(torch.randn(2, 77, 80), torch.randn(2, 48), torch.tensor([[64.0, 64, 0, 3, 16, 16]] * 2))


def denoiser(base: Path, dtype: torch.dtype = torch.float32) -> SDXLDenoiser:
    checkpoint = SDXLCheckpoint(str(base))
    return SDXLDenoiser(checkpoint.load_unet(dtype), checkpoint.preconditioning())


def network(denoise: SDXLDenoiser, x: Tensor, t: Tensor) -> Tensor:
    added = {"text_embeds": CONDITIONING.pooled, "time_ids": CONDITIONING.time_ids}
    return denoise.unet(x, t, CONDITIONING.context, added_cond_kwargs=added).sample


@pytest.mark.parametrize("base", ["tiny", "tiny_v"])
@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_agrees_with_diffusers_euler_scheduler(base: str, timestep: int, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(base)
    denoise = denoiser(folder)
    scheduler = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(timesteps=[timestep])
    sigma = TimestepSchedule().sigmas()[timestep]
    torch.testing.assert_close(scheduler.sigmas[0], sigma)
    x = torch.randn(2, 4, 8, 8) * sigma
    output = network(denoise, scheduler.scale_model_input(x, scheduler.timesteps[0]), torch.tensor(float(timestep)))
    theirs = scheduler.step(output, scheduler.timesteps[0], x).pred_original_sample
    ours = denoise(x, sigma.expand(2), CONDITIONING)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * (1 + sigma.item()))


@pytest.mark.parametrize("sigma", [0.002, 0.7, 80.0])
def test_agrees_with_diffusers_edm_scheduler(tiny_edm: Path, sigma: float) -> None:
    denoise = denoiser(tiny_edm)
    scheduler = EDMDPMSolverMultistepScheduler.from_pretrained(tiny_edm, subfolder="scheduler")
    x, level = torch.randn(2, 4, 8, 8) * sigma, torch.tensor(sigma)
    output = network(denoise, scheduler.precondition_inputs(x, level), scheduler.precondition_noise(level))
    theirs = scheduler.precondition_outputs(x, output, level)
    torch.testing.assert_close(denoise(x, level.expand(2), CONDITIONING), theirs, rtol=1e-5, atol=1e-5)


def test_everything_outside_a_half_precision_network_is_float32(tiny_edm: Path) -> None:
    denoise = denoiser(tiny_edm, torch.bfloat16)
    seen: list[Tensor] = []
    denoise.unet.register_forward_pre_hook(lambda _, args: seen.extend(args))
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.002, 3.0])
    denoised = denoise(x, sigma, CONDITIONING)
    sample, c_noise, context = seen
    assert sample.dtype == context.dtype == torch.bfloat16
    assert c_noise.dtype == denoised.dtype == torch.float32
    c_skip, c_out, _, expected = EDMPreconditioning(0.5)(sigma)
    assert c_noise.equal(expected)
    error = (denoised - c_skip.view(-1, 1, 1, 1) * x) / c_out.view(-1, 1, 1, 1)  # = F, which is bf16
    torch.testing.assert_close(error[0], error[0].bfloat16().float(), rtol=0, atol=2e-4)


def test_time_ids_reach_the_embedding_unrounded(tiny: Path) -> None:
    denoise = denoiser(tiny, torch.bfloat16)
    seen: list[Tensor] = []
    assert isinstance(denoise.unet.add_time_proj, nn.Module)
    denoise.unet.add_time_proj.register_forward_pre_hook(lambda _, args: seen.extend(args))
    ids = torch.tensor([[1023.0, 3000, 1, 3, 1024, 1025]])
    denoise(torch.randn(1, 4, 8, 8), torch.ones(1), Conditioning(torch.randn(1, 77, 80), torch.randn(1, 48), ids))
    assert seen[0].flatten().equal(ids.flatten())
