from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_edm.batch import Batch
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.modules.statistics import latent_statistics


def batches(images: torch.Tensor, size: int) -> list[dict[str, torch.Tensor]]:
    return [{"image": part, "label": torch.zeros(len(part)).long()} for part in images.split(size)]


def test_known_moments_whatever_the_batches(pixels: Callable[..., Any]) -> None:
    """Channels of mean 1 and -3 and of deviation 2 and 0.5: the mean square is (1 + 4 + 9 + 0.25) / 2."""
    z = torch.randn(70, 2, 5, 5, dtype=torch.float64)
    z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True, correction=0)
    images = z * torch.tensor([2.0, 0.5]).view(2, 1, 1) + torch.tensor([1.0, -3.0]).view(2, 1, 1)
    for size in (1, 32, 70):
        found = latent_statistics(pixels(), batches(images, size))
        assert found.count == 70
        assert found.sigma_data == pytest.approx((14.25 / 2) ** 0.5, rel=1e-9)
        assert found.mean == pytest.approx([1, -3], rel=1e-9)
        assert found.std == pytest.approx([2, 0.5], rel=1e-9)


def test_lines_are_yaml_for_a_config(pixels: Callable[..., Any]) -> None:
    found = latent_statistics(pixels(), batches(torch.full((2, 1, 4, 4), -0.5), 2))
    assert yaml.safe_load(str(found)) == {"sigma_data": 0.5, "p_mean": -1.2}
    assert "2 images; of each channel mean [-0.5], std [0.0]" in str(found)


def test_latents_of_a_vae(tiny: Path, batch: Batch) -> None:
    module = SDXLModule(str(tiny))
    module.configure_model()
    found = latent_statistics(module, [batch])
    latents = torch.cat([module.encode(batch) for _ in range(20)])
    assert found.sigma_data == pytest.approx(latents.square().mean().sqrt().item(), rel=0.05)
    assert (found.count, len(found.mean), len(found.std)) == (2, 4, 4)


def test_no_images(pixels: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="no images to measure"):
        latent_statistics(pixels(), [])
