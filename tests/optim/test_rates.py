"""What learning rates amount to, and which are warned of."""

import pytest
import torch
from prodigyopt import Prodigy
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_edm.optim import GroupedProdigy, effective_rates, rate_warning


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def take(optimizer: Optimizer, steps: int = 20) -> None:
    """Descends towards 1."""
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.detach() - 1
        optimizer.step()


class TestRates:
    def test_of_every_group(self) -> None:
        groups = [{"name": "unet", "params": parameters(1)}, {"name": "embeddings", "params": parameters(), "lr": 0.5}]
        grouped = GroupedProdigy(groups, d0=1e-3)
        assert effective_rates(grouped) == {"unet": 1e-3, "embeddings": 0.5e-3}
        take(grouped)
        one, other = (group["d"] for group in grouped.param_groups)
        assert one > 1e-3
        assert effective_rates(grouped) == {"unet": one, "embeddings": other * 0.5}

    def test_are_not_waited_for(self) -> None:
        """On the meta device, where nothing can be looked at."""
        grouped = GroupedProdigy([nn.Parameter(torch.ones(2, device="meta"))])
        take(grouped, 1)
        rate = effective_rates(grouped)["group_0"]
        assert isinstance(rate, Tensor)
        assert rate.is_meta

    def test_of_other_optimizers(self) -> None:
        assert effective_rates(AdamW([{"params": parameters(), "lr": 0.5}, {"params": parameters(1)}], lr=0.1)) == {
            "group_0": 0.5,
            "group_1": 0.1,
        }
        prodigy = Prodigy(parameters(), lr=0.5)
        take(prodigy)
        assert effective_rates(prodigy) == {"group_0": 0.5 * prodigy.param_groups[0]["d"]}

    @pytest.mark.parametrize("kind", [GroupedProdigy, Prodigy])
    @pytest.mark.parametrize(("lr", "warns"), [(1e-3, True), (0.09, True), (0.1, False), (1.0, False), (11.0, True)])
    def test_that_prodigy_wants(self, kind: type[Optimizer], lr: float, warns: bool) -> None:
        said = rate_warning(kind(parameters(), lr=lr))  # type: ignore[call-arg]
        assert (said is not None) == warns
        if said:
            assert said.startswith(f"model.init_args.optimizer.init_args.lr is {lr:g}")
            assert "1.0 is usual" in said

    @pytest.mark.parametrize(
        ("kind", "lr", "warns"),
        [(AdamW, 1.0, True), (AdamW, 0.1, True), (AdamW, 0.01, False), (SGD, 1.0, False), (Adadelta, 1.0, False)],
    )
    def test_that_others_want(self, kind: type[Optimizer], lr: float, warns: bool) -> None:
        said = rate_warning(kind(parameters(), lr=lr))  # type: ignore[call-arg]
        assert (said is not None) == warns
        assert said is None or (said.startswith("model.init_args.optimizer.init_args.lr") and "1e-4 is usual" in said)

    @pytest.mark.parametrize("name", ["embeddings", "text_encoders"])
    def test_of_a_group_name_its_key(self, name: str) -> None:
        groups = [{"name": "unet", "params": parameters()}, {"name": name, "params": parameters(1), "lr": 1e-3}]
        said = rate_warning(GroupedProdigy(groups))
        assert said is not None
        assert said.startswith(f"model.init_args.{name}_lr is 0.001")

    def test_of_0_and_of_a_warm_up_are_fine(self) -> None:
        grouped = GroupedProdigy([{"params": parameters()}, {"params": parameters(1), "lr": 0.0}])
        assert rate_warning(grouped) is None
        LambdaLR(grouped, lambda step: 0.01 * (step + 1))
        assert grouped.param_groups[0]["lr"] == 0.01
        assert rate_warning(grouped) is None
