import torch

from lit_edm.edm import append_dims


def test_axes_are_appended_until_broadcasting_is_per_example() -> None:
    assert append_dims(torch.ones(5), 4).shape == (5, 1, 1, 1)
    assert append_dims(torch.ones(5), 1).shape == (5,)
    x, sigma = torch.randn(3, 2, 3), torch.tensor([1.0, 2.0, 3.0])
    for i in range(3):
        assert torch.equal((append_dims(sigma, 3) * x)[i], sigma[i] * x[i])
