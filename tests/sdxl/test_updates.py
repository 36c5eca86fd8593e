import pytest
import torch
from torch import Tensor

from lit_edm.errors import InputError
from lit_edm.sdxl.updates import AdapterWeights, LayerUpdate, LoHaUpdate, LoKrUpdate, LoRAUpdate, from_factors


def some(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_lora_is_a_scaled_product() -> None:
    update = LoRAUpdate(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0], [-1.0]]), scale=0.5)
    assert update.delta(some(3, 2)).tolist() == [[1.5, 3.0], [0.0, 0.0], [-0.5, -1.0]]
    assert (update.rank, update.size) == (1, (3, 2))


def test_lora_of_a_convolution_is_one_convolution_after_another() -> None:
    update = LoRAUpdate(some(2, 3, 3, 3), some(5, 2, 1, 1), scale=2.0)
    x = some(1, 3, 6, 6)
    twice = torch.conv2d(torch.conv2d(x, update.a, padding=1), update.b) * 2
    torch.testing.assert_close(torch.conv2d(x, update.delta(some(5, 3, 3, 3)), padding=1), twice)
    assert update.size == (5, 27)


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 3, 1)])
def test_dora_has_rows_of_its_magnitude_in_the_direction_of_the_updated_weight(shape: tuple[int, ...]) -> None:
    base, magnitude = some(*shape), torch.tensor([1.0, 2.0, 0.5, 3.0])
    a, b = some(2, *shape[1:]), some(4, 2)
    merged = (base + LoRAUpdate(a, b, 3.0, magnitude).delta(base)).flatten(1)
    direction = base.flatten(1) + 3 * b @ a.flatten(1)
    torch.testing.assert_close(merged.norm(dim=1), magnitude)
    torch.testing.assert_close(torch.cosine_similarity(merged, direction), torch.ones(4))


def test_dora_at_the_norms_of_the_base_and_b_of_zero_changes_nothing() -> None:
    base = some(4, 6)
    update = LoRAUpdate(some(2, 6), torch.zeros(4, 2), 1.0, base.norm(dim=1))
    torch.testing.assert_close(update.delta(base), torch.zeros(4, 6), atol=1e-6, rtol=0)


def test_loha_multiplies_by_element() -> None:
    one = torch.ones(1, 1)
    update = LoHaUpdate(torch.tensor([[2.0], [3.0]]), one, torch.tensor([[5.0], [7.0]]), one, scale=0.1)
    torch.testing.assert_close(update.delta(some(2, 1)), torch.tensor([[1.0], [2.1]]))
    assert (update.rank, update.size) == (1, (2, 1))


def test_lokr_is_a_kronecker_product_of_full_or_factored_matrices() -> None:
    first, a, b = some(2, 3), some(4, 2), some(2, 5)
    expected = 2 * torch.kron(first, a @ b)
    factored, full = LoKrUpdate((first,), (a, b), 2.0), LoKrUpdate((first,), (a @ b,), 2.0)
    for update in (factored, full):
        torch.testing.assert_close(update.delta(some(8, 15)), expected)
        assert update.size == (8, 15)
    assert factored.rank == 2


def test_lokr_of_a_convolution_has_kernels_in_the_second_matrix() -> None:
    first, second = some(2, 3), some(4, 2, 3, 3)
    update = LoKrUpdate((first,), (second,))
    expected = torch.stack(
        [torch.stack([torch.kron(first, second[..., y, x]) for x in range(3)], -1) for y in range(3)], -2
    )
    torch.testing.assert_close(update.delta(some(8, 6, 3, 3)), expected)
    assert update.size == (8, 54)


@pytest.mark.parametrize(
    "update",
    [
        LoRAUpdate(some(2, 3), some(4, 2), 0.5, torch.ones(4)),
        LoHaUpdate(some(4, 2), some(2, 3), some(4, 2), some(2, 3), 0.5),
        LoKrUpdate((some(2, 3),), (some(4, 2), some(2, 5)), 0.5),
        LoKrUpdate((some(4, 2), some(2, 5)), (some(2, 3),), 0.5),
    ],
)
def test_half_precision_is_computed_in_float32(update: LayerUpdate) -> None:
    assert update.delta(torch.zeros(update.size, dtype=torch.bfloat16)).dtype == torch.float32


def test_factors_make_the_same_update_again() -> None:
    for update in (
        LoHaUpdate(some(4, 2), some(2, 3), some(4, 2), some(2, 3), 0.5),
        LoKrUpdate((some(2, 3),), (some(4, 2), some(2, 5)), 0.5),
    ):
        assert from_factors(update.factors(), 0.5).product().equal(update.product())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRAUpdate(some(2, 3), some(4, 3)), r"factors of shapes \(2, 3\), \(4, 3\) do not fit"),
        (lambda: LoRAUpdate(some(2, 3), some(4, 2), 1.0, some(3)), r"\(4, 2\), \(3,\) do not fit"),
        (lambda: LoHaUpdate(some(4, 2), some(2, 3), some(4, 2), some(2, 5)), r"\(4, 2\), \(2, 5\) do not fit"),
        (lambda: LoKrUpdate((some(2, 2),), (some(4, 2), some(3, 2))), r"\(4, 2\), \(3, 2\) do not fit"),
        (lambda: from_factors({"lokr_w1": some(2, 2), "lokr_w2_a": some(2, 2)}, 1.0), "'lokr_w2_b' is missing"),
        (lambda: from_factors({"hada_w1_a": some(2, 2)}, 1.0), "'hada_w1_b' is missing"),
    ],
)
def test_refuses_factors_that_make_no_update(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


def test_adapters_can_be_parted_by_kind() -> None:
    lora, loha = LoRAUpdate(some(1, 2), some(3, 1)), LoHaUpdate(some(3, 1), some(1, 2), some(3, 1), some(1, 2))
    weights = AdapterWeights({"unet": {"a": lora, "b": loha}, "text_encoder": {"c": loha}}, {"clip_l": some(1, 2)})
    assert weights.of_kind(LoRAUpdate).networks == {"unet": {"a": lora}}
    assert weights.of_kind((LoRAUpdate, LoHaUpdate)) == weights
