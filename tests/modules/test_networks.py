import pytest
import torch
from torch import Tensor

from lit_edm.edm import EDMPreconditioning, EDMWeighting
from lit_edm.modules import SmallUNet
from lit_edm.modules.networks import FourierFeatures, SelfAttention


def awake(network: SmallUNet) -> SmallUNet:
    """Moves the layers that are zero at first."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("sigma_data", [0.5, 0.85])
def test_every_noise_level_starts_at_a_loss_of_exactly_one(sigma_data: float) -> None:
    """With F = 0, |y| = sigma_data and n of norm sigma orthogonal to y, as both are on average: no sampling error."""
    y = torch.zeros(7, 1, 4, 4, dtype=torch.float64)
    n = y.clone()
    y[:, :, :2], n[:, :, 2:] = 2**0.5 * sigma_data, 2**0.5
    sigma = torch.logspace(-2.5, 2, 7, dtype=torch.float64)
    network = SmallUNet(1, 3, channels=8).double()
    denoised = EDMPreconditioning(sigma_data).denoise(
        lambda x, c_noise: network(x, c_noise, torch.zeros(7).long()), y + sigma.view(-1, 1, 1, 1) * n, sigma
    )
    loss = EDMWeighting(sigma_data)(sigma) * (denoised - y).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, torch.ones(7).double(), rtol=1e-9, atol=0)


def test_all_parameters_are_reached_after_one_step() -> None:
    network = awake(SmallUNet(3, 2, channels=8, multipliers=(1, 2, 2)))
    network(torch.randn(2, 3, 8, 8), torch.randn(2), torch.tensor([0, 1])).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (4, 12)])
def test_any_size_and_depth(size: tuple[int, int]) -> None:
    for multipliers in ((1,), (1, 2), (1, 2, 3)):
        network = awake(SmallUNet(2, channels=12, multipliers=multipliers))
        x = torch.randn(3, 2, *size)
        assert network(x, torch.randn(3)).shape == x.shape


def changes(network: SmallUNet, x: Tensor, c_noise: Tensor, label: Tensor) -> list[bool]:
    before = network(x[:1], torch.zeros(1), torch.tensor([0]))
    after = network(x, c_noise, label)
    return [not torch.allclose(row, before[0], atol=1e-5) for row in after]


def test_output_depends_on_noise_level_and_class_of_its_own_example() -> None:
    network = awake(SmallUNet(1, 2, channels=8))
    x = torch.randn(1, 1, 4, 4).expand(4, -1, -1, -1)
    c_noise, label = torch.tensor([0.0, 0.1, 0.0, 0.0]), torch.tensor([0, 0, 1, 2])
    assert changes(network, x, c_noise, label) == [False, True, True, True]


def test_default_is_small_enough_for_a_cpu() -> None:
    assert 1e5 < sum(p.numel() for p in SmallUNet(1, 10).parameters()) < 3.5e5


def test_attention_is_softmax_of_products() -> None:
    attention = SelfAttention(8)
    torch.nn.init.normal_(attention.project.weight)
    x = torch.randn(2, 8, 3, 2)
    query, key, value = attention.query_key_value(attention.norm(x)).flatten(2).chunk(3, dim=1)
    weights = (query.transpose(1, 2) @ key / 8**0.5).softmax(dim=-1)
    attended = (value @ weights.transpose(1, 2)).view(x.shape)
    torch.testing.assert_close(attention(x), x + attention.project(attended))


def test_noise_levels_of_the_paper_are_told_apart() -> None:
    c_noise = torch.tensor([0.002, 0.0021, 1.0, 1.05, 79.0, 80.0]).log() / 4
    features = FourierFeatures(32)(c_noise)
    assert features.shape == (6, 32)
    assert (torch.cdist(features, features) + torch.eye(6) > 0.1).all()
