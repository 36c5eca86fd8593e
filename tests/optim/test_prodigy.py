"""prodigyopt's Prodigy is the reference: a group must do, to rounding, what a Prodigy of its own would.

Its first steps are a few units in the last place of float32, from which d follows: comparisons are in float64.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from lightning.pytorch.loggers import CSVLogger
from prodigyopt import Prodigy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import lit_edm.optim
from lit_edm.errors import InputError
from lit_edm.optim import GroupedProdigy

SETTINGS: list[dict[str, Any]] = [
    {},
    {"lr": 0.5, "betas": (0.9, 0.99), "weight_decay": 0.1, "use_bias_correction": True, "safeguard_warmup": True},
    {"beta3": 0.9, "eps": 1e-6, "weight_decay": 0.1, "decouple": False, "d0": 1e-3},
    {"d_coef": 0.5, "growth_rate": 1.02, "slice_p": 3, "betas": (0.0, 0.9)},
    {"betas": (0.0, 0.99), "weight_decay": 0.1, "decouple": False, "slice_p": 2, "use_bias_correction": True},
]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5,))] + [
        nn.Parameter(torch.zeros(4, dtype=dtype))
    ]


def doubles(seed: int = 0) -> list[nn.Parameter]:
    return parameters(seed, torch.float64)


def take(
    optimizer: Optimizer, steps: int = 20, start: int = 0, has_gradient: Callable[[int, int], bool] = lambda *_: True
) -> None:
    """Descends towards 1, with a little noise of its own in each step and parameter."""
    for step in range(start, start + steps):
        for group in optimizer.param_groups:
            for index, parameter in enumerate(group["params"]):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
                gradient = (parameter.detach() - 1) + 0.1 * noise
                parameter.grad = gradient if has_gradient(step, index) else None
        optimizer.step()


def same(one: list[nn.Parameter], other: list[nn.Parameter]) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


def same_state(one: Optimizer, other: Optimizer) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in ours["state"].items():
        torch.testing.assert_close(state, theirs["state"][index], rtol=0, atol=0)
    return ours["param_groups"] == theirs["param_groups"]


def assert_close(ours: Optimizer, theirs: Optimizer) -> None:
    """Compares all that optimizers have of each parameter and each group, and the parameters; ours has all of p0."""
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for key, value in other.items():
            close(mine[key], value)
        for a, b in zip(mine["params"], other["params"], strict=True):
            assert (a in ours.state) == (b in theirs.state)
            for key, value in theirs.state.get(b, {}).items():
                close(ours.state[a][key], value.expand(ours.state[a][key].shape) if key == "p0" else value)


def close(one: Any, other: Any) -> None:
    if isinstance(other, Tensor | float):
        one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (one, other))
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)
    elif isinstance(other, list):
        for a, b in zip(one, other, strict=True):
            close(a, b)
    else:
        assert one == other


def hand_over(one: Optimizer, other: Optimizer) -> None:
    """Gives one optimizer's parameters and state to another."""
    for mine, theirs in zip(other.param_groups, one.param_groups, strict=True):
        for new, old in zip(mine["params"], theirs["params"], strict=True):
            new.data.copy_(old.data)
    other.load_state_dict(copy.deepcopy(one.state_dict()))


def two_groups(
    dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[GroupedProdigy, list[nn.Parameter], list[nn.Parameter]]:
    one, other = parameters(1, dtype), parameters(2, dtype)
    groups = [{"name": "unet", "params": one}, {"name": "embeddings", "params": other, **settings}]
    return GroupedProdigy(groups, d0=1e-3, weight_decay=0.1), one, other


@pytest.fixture(params=[None, 12], ids=["at once", "in pieces"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps all of a group at once, or so many values."""
    if request.param:
        monkeypatch.setattr("lit_edm.optim.flat.most_at_once", lambda device: request.param)


@pytest.mark.usefixtures("at_once")
class TestAgainstProdigy:
    @pytest.mark.parametrize("settings", SETTINGS)
    def test_one_group_is_one_prodigy(self, settings: dict[str, Any]) -> None:
        ours = doubles()
        grouped, prodigy = GroupedProdigy(ours, **settings), Prodigy(doubles(), **settings)
        take(grouped, 150)
        take(prodigy, 150)
        assert_close(grouped, prodigy)
        assert (grouped.param_groups[0]["d"] > 1e3 * 1e-6) or "growth_rate" in settings
        assert not same(ours, doubles())

    @pytest.mark.parametrize("settings", SETTINGS)
    def test_two_groups_are_two_prodigies(self, settings: dict[str, Any]) -> None:
        grouped, *_ = two_groups(torch.float64, **settings)
        prodigies = [
            Prodigy([{"name": "unet", "params": doubles(1)}], d0=1e-3, weight_decay=0.1),
            Prodigy([{"name": "", "params": doubles(2)}], **({"d0": 1e-3, "weight_decay": 0.1} | settings)),
        ]
        take(grouped)
        for group, prodigy in zip(grouped.param_groups, prodigies, strict=True):
            take(prodigy)
            prodigy.param_groups[0]["name"] = group["name"]
            one = copy.copy(grouped)
            one.param_groups = [group]
            assert_close(one, prodigy)

    @pytest.mark.parametrize("settings", SETTINGS)
    def test_gradients_come_and_go(self, settings: dict[str, Any]) -> None:
        """Of each parameter, the first of which has none in the beginning; of all in some steps."""

        def has_gradient(step: int, index: int) -> bool:
            return step % 7 != 5 and (step + index) % 3 != 0

        grouped, prodigy = GroupedProdigy(doubles(), **settings), Prodigy(doubles(), **settings)
        for steps in (2, 100):
            take(grouped, steps, has_gradient=has_gradient)
            take(prodigy, steps, has_gradient=has_gradient)
            assert_close(grouped, prodigy)

    @pytest.mark.parametrize("settings", [{}, {"use_bias_correction": True, "betas": (0.0, 0.99)}])
    def test_no_step_before_a_gradient_is_other_than_0(self, settings: dict[str, Any]) -> None:
        ours, theirs = doubles(), doubles()
        grouped, prodigy = GroupedProdigy(ours, **settings), Prodigy(theirs, **settings)
        for optimizer in (grouped, prodigy):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.zeros_like(parameter)
            for _ in range(3):
                optimizer.step()
        assert same(ours, doubles())
        assert [grouped.param_groups[0][key] for key in ("d", "d_max", "k")] == [1e-6, 1e-6, 0]
        take(grouped)
        take(prodigy)
        for parameter in theirs:
            prodigy.state[parameter]["step"] += 3  # these are counted here
        assert_close(grouped, prodigy)

    def test_in_single_precision(self) -> None:
        """With gradients that do not follow from the parameters, whose rounding they would feed back."""
        generator = torch.Generator().manual_seed(0)
        start, drift, *noise = torch.randn(102, 512, generator=generator)
        weights = []
        for kind in (GroupedProdigy, Prodigy):
            parameters = [nn.Parameter(part.clone()) for part in start.split([100, 200, 212])]
            optimizer = kind(parameters, d0=1e-4, weight_decay=0.01, growth_rate=1.05)
            for step in noise:
                for parameter, gradient in zip(parameters, (drift + step).split([100, 200, 212]), strict=True):
                    parameter.grad = gradient.clone()
                optimizer.step()
            weights.append([*parameters, torch.tensor(float(optimizer.param_groups[0]["d"]))])
        torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)
        assert not same(weights[0][:3], list(start.split([100, 200, 212])))

    @pytest.mark.parametrize("settings", SETTINGS)
    def test_goes_on_from_a_checkpoint_of_prodigyopt_and_back(self, settings: dict[str, Any]) -> None:
        grouped, prodigy = GroupedProdigy(doubles(), **settings), Prodigy(doubles(), **settings)
        take(prodigy, 8)
        hand_over(prodigy, grouped)
        take(grouped, 8, start=8)
        take(prodigy, 8, start=8)
        assert_close(grouped, prodigy)
        again = Prodigy(doubles(), **settings)
        hand_over(grouped, again)
        for optimizer in (grouped, prodigy, again):
            take(optimizer, 8, start=16)
        assert_close(grouped, prodigy)
        assert_close(grouped, again)

    def test_each_group_finds_its_own_d(self) -> None:
        near, far = nn.Parameter(torch.full((4,), 1.1)), nn.Parameter(torch.full((4,), 100.0))
        grouped = GroupedProdigy([{"params": [near]}, {"params": [far]}])
        take(grouped, 200)
        small, large = (group["d"] for group in grouped.param_groups)
        assert large > 10 * small > 1e-4

    def test_prodigyopt_says_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        take(two_groups()[0])
        assert capsys.readouterr().out == ""


class TestLeftAlone:
    @pytest.mark.parametrize("decouple", [True, False])
    def test_a_group_of_rate_0(self, decouple: bool) -> None:
        grouped, one, other = two_groups(lr=0.0, decouple=decouple)
        take(grouped)
        assert same(other, parameters(2))
        assert not same(one, parameters(1))
        assert grouped.param_groups[1]["d"] == 1e-3
        assert not grouped.state.keys() & set(other)

    def test_a_group_whose_rate_becomes_0(self) -> None:
        grouped, _, other = two_groups()
        take(grouped)
        frozen, states = copy.deepcopy((other, [grouped.state[p] for p in other]))
        estimate = grouped.param_groups[1]["d"]
        grouped.param_groups[1]["lr"] = 0.0
        take(grouped, start=20)
        assert same(other, frozen)
        assert grouped.param_groups[1]["d"] == estimate
        torch.testing.assert_close([grouped.state[p] for p in other], states, rtol=0, atol=0)

    def test_a_group_without_gradients(self) -> None:
        grouped, one, other = two_groups()
        take(grouped)
        frozen = [p.detach().clone() for p in other]
        estimate = grouped.param_groups[1]["d"]
        for parameter in one:
            parameter.grad = torch.ones_like(parameter)
        for parameter in other:
            parameter.grad = None
        grouped.step()
        assert all(p.equal(f) for p, f in zip(other, frozen, strict=True))
        assert grouped.param_groups[1]["d"] == estimate

    def test_a_parameter_without_gradient_has_no_share_in_d(self) -> None:
        ours, alone = parameters(), parameters()[:1]
        grouped, other = GroupedProdigy(ours, weight_decay=0.1), GroupedProdigy(alone, weight_decay=0.1)
        for _ in range(5):
            ours[0].grad, alone[0].grad = ours[0].detach() - 1, alone[0].detach() - 1
            grouped.step()
            other.step()
        assert ours[0].equal(alone[0])
        assert same(ours[1:], parameters()[1:])
        assert not grouped.state.keys() & set(ours[1:])
        assert grouped.param_groups[0]["d"] == other.param_groups[0]["d"]

    def test_a_rate_of_0_for_all_and_a_decay_of_0_for_one(self) -> None:
        one, other = parameters(1), parameters(2)
        groups = [{"params": one, "lr": 1.0}, {"params": other, "weight_decay": 0.0}]
        grouped = GroupedProdigy(groups, lr=0.0, weight_decay=0.1)
        assert [(g["lr"], g["weight_decay"]) for g in grouped.param_groups] == [(1.0, 0.1), (0.0, 0.0)]


class TestAnOptimizer:
    @pytest.mark.parametrize("settings", SETTINGS)
    def test_resumes_bit_for_bit(self, settings: dict[str, Any], tmp_path: Path) -> None:
        whole, one, other = two_groups(**settings)
        take(whole, 20)
        first, *_ = two_groups(**settings)
        take(first, 8)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        again, new_one, new_other = two_groups(**settings)
        for mine, theirs in zip(again.param_groups, first.param_groups, strict=True):
            for new, old in zip(mine["params"], theirs["params"], strict=True):
                new.data.copy_(old.data)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        take(again, 12, start=8)
        assert same(one + other, new_one + new_other)
        assert same_state(again, whole)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
    def test_copies_go_on_by_themselves(self, copied: Callable[[Optimizer], Optimizer]) -> None:
        grouped, one, other = two_groups()
        take(grouped)
        twin = copied(grouped)
        before = [p.detach().clone() for p in one + other]
        take(twin, start=20)
        assert all(p.equal(b) for p, b in zip(one + other, before, strict=True))
        take(grouped, start=20)
        assert same_state(twin, grouped)

    def test_a_group_added_later_begins_at_its_own_d0(self) -> None:
        late, alone = doubles(3), doubles(3)
        grouped = GroupedProdigy(doubles(1))
        take(grouped)
        grouped.add_param_group({"params": late, "d0": 1e-3})
        take(grouped, start=20)
        take(Prodigy(alone, d0=1e-3), start=20)
        close(late, alone)

    def test_groups_of_the_caller_stay_as_they_are(self) -> None:
        group = {"params": parameters(), "lr": 0.5}
        GroupedProdigy([group])
        assert group.keys() == {"params", "lr"}

    def test_follows_a_schedule_for_each_group(self) -> None:
        grouped, one, other = two_groups(torch.float64, lr=0.5)
        schedule = LambdaLR(grouped, [lambda step: 1.0, lambda step: float(step < 10)])
        alone, half = doubles(1), doubles(2)
        take(Prodigy(alone, d0=1e-3, weight_decay=0.1), 20)
        take(Prodigy(half, d0=1e-3, weight_decay=0.1, lr=0.5), 10)
        for step in range(20):
            take(grouped, 1, start=step)
            schedule.step()
        close([*one, *other], [*alone, *half])

    def test_closures_are_evaluated_once_with_gradient(self) -> None:
        parameter, calls = nn.Parameter(torch.ones(2)), []

        def closure() -> Tensor:
            calls.append(loss := parameter.square().sum())
            loss.backward()
            return loss

        assert GroupedProdigy([parameter]).step(closure) == 2  # type: ignore[arg-type]
        assert len(calls) == 1

    def test_hooks_of_a_step_are_called_once(self) -> None:
        grouped, *_ = two_groups()
        calls: list[str] = []
        grouped.register_step_pre_hook(lambda *_: calls.append("before"))
        grouped.register_step_post_hook(lambda *_: calls.append("after"))
        take(grouped, 1)
        assert calls == ["before", "after"]

    def test_scaled_gradients(self) -> None:
        ours, alone = doubles(), doubles()
        grouped, scaler = GroupedProdigy(ours), torch.amp.GradScaler("cpu", init_scale=8.0)
        plain = Prodigy(alone)
        for _ in range(3):
            for optimizer in (grouped, plain):
                optimizer.zero_grad()
            scaler.scale(torch.stack([(p - 1).square().sum() for p in ours]).sum()).backward()
            torch.stack([(p - 1).square().sum() for p in alone]).sum().backward()
            scaler.step(grouped)
            scaler.update()
            plain.step()
        close(ours, alone)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("betas", (0.9, 1.0)),
        ("beta3", 1.0),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("d0", 0.0),
        ("d_coef", 0.0),
        ("growth_rate", 0.9),
        ("slice_p", 0),
    ],
)
def test_settings_out_of_their_range(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^GroupedProdigy\.{name} is .*; it must be "):
        GroupedProdigy(parameters(), **{name: value})
    with pytest.raises(InputError, match=rf"^GroupedProdigy\.{name} of unet is "):
        GroupedProdigy([{"params": parameters(), "name": "unet", name: value}])


class Toy(LightningModule):
    """A module with two groups, whose optimizer a command line names."""

    def __init__(self, optimizer: OptimizerCallable = torch.optim.Adam) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        self.optimizer = optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.other(self.one(batch)).square().mean()

    def configure_optimizers(self) -> Optimizer:
        parts = {"one": self.one, "other": self.other}
        return self.optimizer([{"params": list(part.parameters()), "name": n} for n, part in parts.items()])


@pytest.mark.parametrize("name", ["GroupedProdigy", "lit_edm.optim.GroupedProdigy"])
def test_a_command_line_names_it(name: str) -> None:
    assert lit_edm.optim.GroupedProdigy is GroupedProdigy  # imported: short names are those of what is
    arguments = [f"--model.optimizer={name}", "--model.optimizer.betas=[0.9, 0.99]", "--model.optimizer.lr=0.5"]
    cli = LightningCLI(Toy, run=False, save_config_callback=None, args=arguments, auto_configure_optimizers=False)
    optimizer = cli.model.configure_optimizers()
    assert type(optimizer) is GroupedProdigy
    assert [(g["name"], g["lr"], tuple(g["betas"])) for g in optimizer.param_groups] == [
        (n, 0.5, (0.9, 0.99)) for n in ("one", "other")
    ]


def test_lightning_trains_logs_and_resumes_with_it(tmp_path: Path) -> None:
    def trained(steps: int, resume: Path | None = None) -> tuple[Toy, Trainer]:
        torch.manual_seed(0)
        module = Toy(lambda groups: GroupedProdigy(groups, d0=1e-3))
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=CSVLogger(tmp_path),
            log_every_n_steps=1,
            callbacks=[LearningRateMonitor()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(torch.ones(24, 2), batch_size=4), ckpt_path=resume)
        return module, trainer

    whole, trainer = trained(6)
    assert {"lr-GroupedProdigy/one", "lr-GroupedProdigy/other"} <= trainer.callback_metrics.keys()
    _, half = trained(3)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = trained(6, tmp_path / "half.ckpt")
    assert same_state(resumed.optimizers(), whole.optimizers())
    assert same(list(resumed.parameters()), list(whole.parameters()))
