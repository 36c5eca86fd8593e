from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lit_edm.errors import InputError
from lit_edm.sdxl.merge import Merge, Method, summed
from lit_edm.sdxl.merge_tokens import renamed_tokens
from lit_edm.sdxl.updates import AdapterWeights, LayerUpdate, LoHaUpdate, LoKrUpdate, LoRAUpdate

LINEAR, CONV = "mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv1"
FACTORWISE = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
WHOLE = ("svd", "magnitude_prune_svd", "ties_svd", "dare_linear_svd", "dare_ties_svd")
PRUNING = [method for method in get_args(Method) if method.startswith(("magnitude", "ties", "dare"))]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int, rank: int = 2, scale: float = 1.0) -> LoRAUpdate:
    return LoRAUpdate(drawn(seed, rank, 6), drawn(seed + 100, 5, rank), scale)


def conv(seed: int, rank: int = 2, scale: float = 1.0) -> LoRAUpdate:
    return LoRAUpdate(drawn(seed, rank, 4, 3, 3), drawn(seed + 100, 5, rank, 1, 1), scale)


def loha(seed: int, rows: int, columns: int) -> LoHaUpdate:
    w1, w2 = ((drawn(seed + n, rows, 2), drawn(seed + n + 1, 2, columns)) for n in (0, 2))
    return LoHaUpdate(*w1, *w2, scale=0.5)


def adapter(*updates: LayerUpdate, network: str = "unet") -> AdapterWeights:
    """One whose first layer is linear and whose second is a convolution."""
    return AdapterWeights({network: dict(zip((LINEAR, CONV), updates, strict=False))})


def named(*adapters: AdapterWeights) -> dict[str, AdapterWeights]:
    return dict(zip(("a.safetensors", "b.safetensors", "c.safetensors"), adapters, strict=False))


def merged(merge: Merge, updates: Sequence[LayerUpdate], weights: Sequence[float]) -> LoRAUpdate:
    """The result for one layer that all update."""
    update = merge(named(*map(adapter, updates)), weights).networks["unet"][LINEAR]
    assert isinstance(update, LoRAUpdate)
    return update


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    """Eckart and Young: the largest singular values are kept."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).float()


def largest(matrix: Tensor, density: float) -> Tensor:
    """Zeros all but the largest entries."""
    kept = matrix.abs().flatten().sort(descending=True).indices[: int(density * matrix.numel())]
    flat = torch.zeros(matrix.numel())
    flat[kept] = matrix.flatten()[kept]
    return flat.view_as(matrix)


def elected(tasks: Sequence[Tensor], weights: Sequence[float], by_number: bool = False) -> Tensor:
    """TIES after pruning, entry by entry: the weighted mean of those that have the sign of all."""
    result = torch.zeros(tasks[0].numel())
    for index, entries in enumerate(zip(*(task.flatten().tolist() for task in tasks), strict=True)):
        votes = sum((entry > 0) - (entry < 0) if by_number else entry for entry in entries)
        agreeing = [w * e for w, e in zip(weights, entries, strict=True) if (e > 0 if votes >= 0 else e < 0)]
        result[index] = sum(agreeing) / max(len(agreeing), 1)
    return result.view_as(tasks[0])


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


class TestSums:
    def test_cat_is_the_weighted_sum_of_any_ranks(self) -> None:
        updates, weights = [lora(0, 2, scale=3.0), lora(1, 3), lora(2, 1, scale=0.5)], [0.7, -0.4, 2.0]
        result = merged(Merge(), updates, weights)
        assert result.rank == 2 + 3 + 1
        close(result.product(), sum(w * u.scale * u.b @ u.a for w, u in zip(weights, updates, strict=True)))

    @pytest.mark.parametrize("rank", [1, 2, 4])
    def test_svd_is_the_sums_best_approximation(self, rank: int) -> None:
        updates, weights = [lora(0, 2, scale=3.0), lora(1, 3)], [0.7, -0.4]
        total = sum(w * u.product() for w, u in zip(weights, updates, strict=True))
        result = merged(Merge("svd", rank=rank), updates, weights)
        assert result.rank == rank
        close(result.product(), best_of_rank(total, rank))

    def test_svd_takes_the_largest_rank_if_none_is_given(self) -> None:
        assert merged(Merge("svd"), [lora(0, 2), lora(1, 3)], [1.0, 1.0]).rank == 3

    def test_svd_gives_no_more_than_full_rank(self) -> None:
        result = merged(Merge("svd", rank=64), [lora(0), lora(1)], [1.0, 1.0])
        assert result.rank == 5
        close(result.product(), lora(0).product() + lora(1).product())

    def test_linear_adds_factors(self) -> None:
        first, second = lora(0, scale=4.0), lora(1, scale=0.5)
        result = merged(Merge("linear"), [first, second], [0.25, -2.0])
        close(result.a, first.a - second.a)
        close(result.b, first.b + second.b)

    def test_linear_pads_the_lower_rank(self) -> None:
        result = merged(Merge("linear"), [lora(0, 3), lora(1, 1)], [1.0, 1.0])
        padded = torch.cat([lora(1, 1).a, torch.zeros(2, 6)])
        close(result.a, lora(0, 3).a + padded)
        assert result.rank == 3

    def test_convolutions(self) -> None:
        adapters = named(adapter(lora(0), conv(2)), adapter(lora(1), conv(3, rank=3)))
        for merge in (Merge("cat"), Merge("svd", rank=5)):
            update = merge(adapters, [0.5, 2.0]).networks["unet"][CONV]
            assert isinstance(update, LoRAUpdate)
            assert (update.a.shape, update.b.shape) == ((5, 4, 3, 3), (5, 5, 1, 1))
            close(update.product(), 0.5 * conv(2).product() + 2 * conv(3, rank=3).product())

    def test_layers_that_only_some_update(self) -> None:
        text = adapter(lora(5), network="text_encoder")
        result = Merge()(named(adapter(lora(0)), adapter(lora(1), conv(3)), text), [0.5, -2.0, 3.0])
        assert {name: list(layers) for name, layers in result.networks.items()} == {
            "unet": [LINEAR, CONV],
            "text_encoder": [LINEAR],
        }
        close(result.networks["unet"][CONV].product(), -2 * conv(3).product())
        close(result.networks["text_encoder"][LINEAR].product(), 3 * lora(5).product())


class TestPruning:
    @pytest.mark.parametrize("method", get_args(Method))
    def test_one_adapter_of_which_all_is_kept_stays_what_it_is(self, method: Any) -> None:
        close(merged(Merge(method, density=1.0), [lora(0, scale=3.0)], [1.0]).product(), lora(0, scale=3.0).product())

    def test_magnitude_keeps_the_largest(self) -> None:
        updates, weights = [lora(0, scale=3.0), lora(1)], [0.7, -0.4]
        result = merged(Merge("magnitude_prune_svd", density=0.3, rank=5), updates, weights)
        close(result.product(), 0.7 * largest(updates[0].product(), 0.3) - 0.4 * largest(updates[1].product(), 0.3))
        result = merged(Merge("magnitude_prune", density=0.3), updates, weights)
        close(result.b, 2.1**0.5 * largest(updates[0].b, 0.3) + 0.4**0.5 * largest(updates[1].b, 0.3))

    def test_a_single_adapter_is_pruned_too(self) -> None:
        result = merged(Merge("magnitude_prune_svd", density=0.3, rank=5), [lora(0)], [1.0])
        close(result.product(), largest(lora(0).product(), 0.3))
        assert merged(Merge("svd", rank=1), [lora(0)], [1.0]).rank == 1

    def test_ties_by_hand(self) -> None:
        """Of 2 x 2 updates: signs agree, the larger one wins, it wins again, and zero has no vote."""
        first, second = torch.tensor([[1.0, -3.0], [4.0, 0.0]]), torch.tensor([[3.0, 1.0], [-2.0, 5.0]])
        updates = [LoRAUpdate(matrix, torch.eye(2)) for matrix in (first, second)]
        result = merged(Merge("ties_svd", density=1.0, rank=2), updates, [1.0, 1.0])
        close(result.product(), torch.tensor([[2.0, -3.0], [4.0, 5.0]]))

    def test_signs_are_elected_by_sum_or_by_number(self) -> None:
        updates = [LoRAUpdate(torch.tensor([[value]]), torch.ones(1, 1)) for value in (-9.0, 1.0, 3.0)]
        results = [
            merged(Merge("ties_svd", density=1.0, majority_sign=sign), updates, [1.0] * 3).product().item()
            for sign in ("total", "frequency")
        ]
        assert results == pytest.approx([-9.0, 2.0])

    @pytest.mark.parametrize("sign", ["total", "frequency"])
    def test_ties_of_three(self, sign: Any) -> None:
        updates, weights = [lora(0, scale=3.0), lora(1), lora(2, scale=0.2)], [0.7, 0.4, 1.0]
        result = merged(Merge("ties_svd", density=0.6, majority_sign=sign, rank=5), updates, weights)
        kept = [largest(update.product(), 0.6) for update in updates]
        close(result.product(), elected(kept, weights, by_number=sign == "frequency"))
        result = merged(Merge("ties", density=0.6, majority_sign=sign), updates, weights)
        roots = [(w * u.scale) ** 0.5 for w, u in zip(weights, updates, strict=True)]
        close(result.a, elected([largest(u.a, 0.6) for u in updates], roots, by_number=sign == "frequency"))
        close(result.b, elected([largest(u.b, 0.6) for u in updates], roots, by_number=sign == "frequency"))

    def test_dare_expects_the_sum(self) -> None:
        updates, weights = [lora(0, scale=3.0), lora(1)], [0.7, -0.4]
        draws = [
            merged(Merge("dare_linear_svd", density=0.5, rank=5, seed=seed), updates, weights).product()
            for seed in range(300)
        ]
        total = 0.7 * updates[0].product() - 0.4 * updates[1].product()
        error = torch.stack(draws).mean(0) - total
        spread = torch.stack(draws).std(0) / 300**0.5
        assert (error.abs() < 5 * spread + 1e-5).all()

    @pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
    def test_dare_drops_or_scales_up(self, method: Any) -> None:
        update = LoRAUpdate(torch.ones(2, 60), torch.ones(50, 2))
        result = merged(Merge(method, density=0.25), [update], [1.0])
        assert set(result.a.unique().tolist()) == set(result.b.unique().tolist()) == {0.0, 4.0}
        assert (result.a != 0).float().mean() == pytest.approx(0.25, abs=0.15)

    @pytest.mark.parametrize("method", PRUNING)
    def test_density_and_seed_have_an_effect_and_nothing_else_has(self, method: Any) -> None:
        updates, weights = [lora(0), lora(1)], [1.0, 1.0]
        first = merged(Merge(method, seed=1), updates, weights).product()
        state = torch.get_rng_state()
        torch.rand(1)
        assert torch.equal(merged(Merge(method, seed=1), updates, weights).product(), first)
        torch.set_rng_state(state)
        merged(Merge(method), updates, weights)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(merged(Merge(method, seed=2), updates, weights).product(), first) == ("dare" not in method)
        assert not torch.equal(merged(Merge(method, seed=1, density=0.8), updates, weights).product(), first)


class TestKinds:
    @pytest.mark.parametrize("method", WHOLE)
    def test_lycoris_is_merged_by_svd(self, method: Any) -> None:
        updates = [loha(0, 5, 6), LoKrUpdate((drawn(9, 1, 2),), (drawn(8, 5, 3),)), lora(3)]
        result = merged(Merge(method, density=1.0, rank=5), updates, [1.0, 0.0, 0.0])
        if "ties" not in method:  # whose mean counts adapters of weight 0
            close(result.product(), updates[0].product())
        assert result.rank == 5

    @pytest.mark.parametrize(("layer", "shape"), [("conv1", (4, 3, 3)), ("conv_shortcut", (36, 1, 1)), ("x", (36,))])
    def test_lycoris_alone_does_not_know_the_kernel(self, layer: str, shape: tuple[int, ...]) -> None:
        single = AdapterWeights({"unet": {f"mid_block.resnets.0.{layer}": loha(0, 5, 36)}})
        update = Merge("svd", rank=4)(named(single), [1.0]).networks["unet"][f"mid_block.resnets.0.{layer}"]
        assert isinstance(update, LoRAUpdate)
        assert update.a.shape == (4, *shape)
        assert update.b.shape == (5, 4, *[1] * (len(shape) - 1))
        close(update.product(), best_of_rank(loha(0, 5, 36).product(), 4))

    def test_lycoris_needs_a_rank(self) -> None:
        with pytest.raises(InputError, match=r"a\.safetensors: none is a LoRA whose rank .* give Merge.rank"):
            merged(Merge("svd"), [loha(0, 5, 6)], [1.0])

    @pytest.mark.parametrize("method", ["cat", *FACTORWISE])
    def test_lycoris_has_no_factors_to_merge(self, method: Any) -> None:
        with pytest.raises(InputError, match=rf"b\.safetensors: unet\.{LINEAR} is LoHa, which has no factors"):
            merged(Merge(method), [lora(0), loha(0, 5, 6)], [1.0, 1.0])

    @pytest.mark.parametrize("method", get_args(Method))
    def test_dora_needs_the_base(self, method: Any) -> None:
        dora = LoRAUpdate(lora(0).a, lora(0).b, magnitude=torch.ones(5))
        with pytest.raises(InputError, match=r"b\.safetensors: .* is DoRA, whose update depends on the base's weights"):
            merged(Merge(method), [lora(0), dora], [1.0, 1.0])

    @pytest.mark.parametrize("method", FACTORWISE[1:])
    def test_pruned_factors_have_one_rank(self, method: Any) -> None:
        with pytest.raises(InputError, match=rf"ranks 2 in a\S+, 3 in b\S+, which {method} cannot .* {method}_svd"):
            merged(Merge(method), [lora(0, 2), lora(1, 3)], [1.0, 1.0])

    def test_the_sum_of_all_kinds_with_a_base(self) -> None:
        base = drawn(7, 5, 6)
        dora = LoRAUpdate(lora(0).a, lora(0).b, 0.3, magnitude=drawn(8, 5).abs())
        total = summed(named(*map(adapter, (dora, loha(0, 5, 6), lora(1)))), [0.5, -1.0, 2.0])
        rows = base + 0.3 * lora(0).b @ lora(0).a
        expected = 0.5 * (drawn(8, 5).abs()[:, None] * rows / rows.norm(dim=1, keepdim=True) - base)
        expected = expected - loha(0, 5, 6).product() + 2 * lora(1).product()
        close(total.networks["unet"][LINEAR].delta(base), expected)


class TestTokens:
    def with_tokens(self, seed: int, tokens: Mapping[str, int], rows: int | None = None) -> AdapterWeights:
        number = rows or sum(tokens.values())
        embeddings = {"clip_l": drawn(seed, number, 4), "clip_g": drawn(seed + 1, number, 6)}
        return AdapterWeights({"unet": {LINEAR: lora(seed)}}, embeddings, tokens)

    def test_all_are_kept_and_clashing_words_renamed(self) -> None:
        first, second = self.with_tokens(0, {"TOK": 2}), self.with_tokens(3, {"HAT": 1, "TOK": 2})
        adapters = named(first, adapter(lora(1)), second)
        result = Merge()(adapters, [1.0, 1.0, 1.0])
        assert result.tokens == {"TOK": 2, "HAT": 1, "TOK2": 2}
        for name in ("clip_l", "clip_g"):
            assert torch.equal(result.embeddings[name], torch.cat([first.embeddings[name], second.embeddings[name]]))
        renamed = [(t.path[0], t.old_word, t.old_tokens, t.word, t.tokens) for t in renamed_tokens(adapters)]
        assert renamed == [
            ("a", "TOK", "<s0><s1>", "TOK", "<s0><s1>"),
            ("c", "HAT", "<s0>", "HAT", "<s2>"),
            ("c", "TOK", "<s1><s2>", "TOK2", "<s3><s4>"),
        ]

    def test_words_of_files_that_name_none(self) -> None:
        adapters = named(
            self.with_tokens(0, {}, rows=2), self.with_tokens(1, {}, rows=1), self.with_tokens(2, {"TOK2": 1})
        )
        assert Merge()(adapters, [1.0] * 3).tokens == {"TOK": 2, "TOK2": 1, "TOK22": 1}

    def test_none_stay_none(self) -> None:
        result = Merge()(named(adapter(lora(0)), adapter(lora(1))), [1.0, 1.0])
        assert result.embeddings == result.tokens == {}

    @pytest.mark.parametrize("method", get_args(Method))
    def test_tokens_alone(self, method: Any) -> None:
        alone = [replace(self.with_tokens(seed, {"TOK": 1}), networks={}) for seed in (0, 1)]
        result = Merge(method)(named(*alone), [1.0, 1.0])
        assert (result.networks, result.tokens) == ({}, {"TOK": 1, "TOK2": 1})

    def test_widths_differ(self) -> None:
        other = AdapterWeights({}, {"clip_l": drawn(0, 1, 5), "clip_g": drawn(0, 1, 6)})
        with pytest.raises(InputError, match=r"b\.safetensors: embeddings clip_l are of 5 numbers, but of 4 in a\."):
            Merge()(named(self.with_tokens(0, {"TOK": 2}), other), [1.0, 1.0])


class TestMistakes:
    def test_another_base(self) -> None:
        other = LoRAUpdate(drawn(0, 2, 7), drawn(1, 5, 2))
        with pytest.raises(InputError, match=rf"b\.safetensors: unet\.{LINEAR} is 5 x 7, but 5 x 6 in a\.safetensors"):
            merged(Merge(), [lora(0), other], [1.0, 1.0])

    def test_number_of_weights(self) -> None:
        with pytest.raises(InputError, match="there are 2 adapters, but 1 weights"):
            merged(Merge(), [lora(0), lora(1)], [1.0])

    @pytest.mark.parametrize(
        "settings",
        [{"density": 0.0}, {"density": 1.1}, {"method": "svd", "rank": 0}, {"rank": 4}, {"method": "slerp"}],
        ids=str,
    )
    def test_settings(self, settings: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=rf"^Merge\.{list(settings)[-1]} must be "):
            Merge(**settings)
