from pathlib import Path

import pytest
import torch

from lit_edm.sdxl import LatentSpace, SDXLCheckpoint


@pytest.mark.parametrize("base", ["tiny", "tiny_edm"])
def test_encoding_follows_the_vaes_config(base: str, request: pytest.FixtureRequest) -> None:
    vae = SDXLCheckpoint(str(request.getfixturevalue(base))).load_vae(torch.float32)
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    mean = torch.tensor(vae.config.latents_mean or [0.0] * 4).view(1, 4, 1, 1)
    std = torch.tensor(vae.config.latents_std or [1.0] * 4).view(1, 4, 1, 1)
    torch.manual_seed(0)
    expected = (vae.encode(image).latent_dist.sample() - mean) * vae.config.scaling_factor / std
    torch.manual_seed(0)
    space = LatentSpace(vae)
    latents = space.encode(image)
    torch.testing.assert_close(latents, expected)
    assert latents.shape == (2, *space.shape(16, 24)) == (2, 4, 8, 12)
    z = latents * std / vae.config.scaling_factor + mean  # as StableDiffusionXLPipeline undoes it
    torch.testing.assert_close(space.decode(latents), vae.decode(z).sample)


def test_sampling_is_anew_each_time(tiny: Path) -> None:
    space = LatentSpace(SDXLCheckpoint(str(tiny)).load_vae(torch.float32))
    image = torch.zeros(1, 3, 16, 16)
    assert not space.encode(image).equal(space.encode(image))


def test_autocast_does_not_reach_the_vae(tiny: Path) -> None:
    space = LatentSpace(SDXLCheckpoint(str(tiny)).load_vae(torch.float32))
    image = torch.rand(1, 3, 16, 16)
    torch.manual_seed(0)
    plain = space.encode(image)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = space.encode(image)
        decoded = space.decode(inside)
    assert inside.equal(plain)
    assert decoded.equal(space.decode(plain))


def test_latents_are_float32_from_a_half_precision_vae(tiny: Path) -> None:
    space = LatentSpace(SDXLCheckpoint(str(tiny)).load_vae(torch.bfloat16))
    latents = space.encode(torch.rand(1, 3, 16, 16))
    assert latents.dtype == space.decode(latents).dtype == torch.float32
