import torch
from torch import Tensor

from lit_edm.edm import EDMLoss
from lit_edm.edm.draws import Share, drawn, gathered, sharing, unit_noise_like


def normal(count: int) -> Tensor:
    return torch.randn(count, 3)


def test_alone_draws_come_from_the_global_generator() -> None:
    torch.manual_seed(3)
    alone = drawn(4, normal)
    torch.manual_seed(3)
    assert alone.equal(torch.randn(4, 3))


def test_processes_draw_what_one_would_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    whole = [drawn(7, normal), drawn(7, normal)]
    rows: list[list[Tensor]] = []
    for first in (0, 2, 4):
        torch.manual_seed(first)
        with sharing(Share(3, first, 7)):
            rows.append([drawn(2, normal), drawn(2, normal)])
        torch_goes_on = torch.randn(2)
        torch.manual_seed(first)
        assert torch_goes_on.equal(torch.randn(2))
    for number in (0, 1):
        assert torch.cat([of_process[number] for of_process in rows]).equal(whole[number][:6])


def test_rows_beyond_the_end_repeat_the_last() -> None:
    with sharing(Share(3, 4, 5)):
        beyond = drawn(3, normal)
    with sharing(Share(3, 0, 5)):
        assert beyond.equal(drawn(5, normal)[[4, 4, 4]])


def test_a_share_ends_with_its_context() -> None:
    with sharing(Share(3, 0, 8)):
        assert len(drawn(2, normal)) == 2
    assert gathered(torch.ones(2)).equal(torch.ones(2))
    torch.manual_seed(0)
    alone = drawn(2, normal)
    torch.manual_seed(0)
    assert alone.equal(normal(2))


def test_noise_of_the_first_axes() -> None:
    x = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    assert unit_noise_like(x).shape == x.shape
    assert unit_noise_like(x, axes=2).shape == (2, 3)
    assert unit_noise_like(x).dtype == torch.float64


def test_the_loss_of_shares_is_the_loss_of_the_whole() -> None:
    """All that EDMLoss draws: noise levels, noise, its offset and perturbation."""
    loss = EDMLoss(noise_offset=0.3, input_perturbation=0.1)
    clean = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    whole = loss(lambda x, sigma: x * sigma[:, None, None, None], clean)
    parts = []
    for first in (0, 3):
        with sharing(Share(5, first, 6)):
            parts.append(loss(lambda x, sigma: x * sigma[:, None, None, None], clean[first : first + 3]))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=0)
