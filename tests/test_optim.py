"""prodigyopt's Prodigy is the reference: a group must do, bit for bit, what a Prodigy of its own would."""

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
from torch.optim import SGD, Adadelta, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import lit_edm.optim
from lit_edm.errors import InputError
from lit_edm.optim import GroupedProdigy, WarmupSchedule, effective_rates, rate_warning

SETTINGS: list[dict[str, Any]] = [
    {},
    {"lr": 0.5, "betas": (0.9, 0.99), "weight_decay": 0.1, "use_bias_correction": True, "safeguard_warmup": True},
    {"beta3": 0.9, "eps": 1e-6, "weight_decay": 0.1, "decouple": False, "d0": 1e-3},
    {"d_coef": 0.5, "growth_rate": 1.02, "slice_p": 3, "betas": (0.0, 0.9)},
]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))] + [
        nn.Parameter(torch.zeros(4))
    ]


def take(optimizer: Optimizer, steps: int = 20, start: int = 0) -> None:
    """Descends towards 1, with a little noise of its own in each step and parameter."""
    for step in range(start, start + steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
                parameter.grad = (parameter.detach() - 1) + 0.1 * noise
        optimizer.step()


def same(one: list[nn.Parameter], other: list[nn.Parameter]) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


def same_state(one: Optimizer, other: Optimizer) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in ours["state"].items():
        torch.testing.assert_close(state, theirs["state"][index], rtol=0, atol=0)
    return ours["param_groups"] == theirs["param_groups"]


def two_groups(**settings: Any) -> tuple[GroupedProdigy, list[nn.Parameter], list[nn.Parameter]]:
    one, other = parameters(1), parameters(2)
    groups = [{"name": "unet", "params": one}, {"name": "embeddings", "params": other, **settings}]
    return GroupedProdigy(groups, d0=1e-3, weight_decay=0.1), one, other


class TestAgainstProdigy:
    @pytest.mark.parametrize("settings", SETTINGS)
    def test_one_group_is_one_prodigy(self, settings: dict[str, Any]) -> None:
        ours, theirs = parameters(), parameters()
        grouped, prodigy = GroupedProdigy(ours, **settings), Prodigy(theirs, **settings)
        take(grouped)
        take(prodigy)
        assert same(ours, theirs)
        assert not same(ours, parameters())
        assert same_state(grouped, prodigy)

    @pytest.mark.parametrize("settings", SETTINGS)
    def test_two_groups_are_two_prodigies(self, settings: dict[str, Any]) -> None:
        grouped, one, other = two_groups(**settings)
        alone, other_alone = parameters(1), parameters(2)
        prodigies = [
            Prodigy(alone, d0=1e-3, weight_decay=0.1),
            Prodigy(other_alone, **({"d0": 1e-3, "weight_decay": 0.1} | settings)),
        ]
        take(grouped)
        for prodigy in prodigies:
            take(prodigy)
        assert same(one, alone)
        assert same(other, other_alone)
        assert [g["d"] for g in grouped.param_groups] == [p.param_groups[0]["d"] for p in prodigies]

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
        grouped, prodigy = GroupedProdigy(ours, weight_decay=0.1), Prodigy(alone, weight_decay=0.1)
        for _ in range(5):
            ours[0].grad, alone[0].grad = ours[0].detach() - 1, alone[0].detach() - 1
            grouped.step()
            prodigy.step()
        assert ours[0].equal(alone[0])
        assert same(ours[1:], parameters()[1:])
        assert grouped.param_groups[0]["d"] == prodigy.param_groups[0]["d"]

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
        late, alone = parameters(3), parameters(3)
        grouped = GroupedProdigy(parameters(1))
        take(grouped)
        grouped.add_param_group({"params": late, "d0": 1e-3})
        take(grouped, start=20)
        take(Prodigy(alone, d0=1e-3), start=20)
        assert same(late, alone)

    def test_groups_of_the_caller_stay_as_they_are(self) -> None:
        group = {"params": parameters(), "lr": 0.5}
        GroupedProdigy([group])
        assert group.keys() == {"params", "lr"}

    def test_follows_a_schedule_for_each_group(self) -> None:
        grouped, one, other = two_groups(lr=0.5)
        schedule = LambdaLR(grouped, [lambda step: 1.0, lambda step: float(step < 10)])
        alone, half = parameters(1), parameters(2)
        take(Prodigy(alone, d0=1e-3, weight_decay=0.1), 20)
        take(Prodigy(half, d0=1e-3, weight_decay=0.1, lr=0.5), 10)
        for step in range(20):
            take(grouped, 1, start=step)
            schedule.step()
        assert same(one, alone)
        assert same(other, half)

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
        ours, alone = parameters(), parameters()
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
        assert same(ours, alone)


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


class TestRates:
    def test_of_every_group(self) -> None:
        grouped, *_ = two_groups(lr=0.5)
        take(grouped)
        one, other = (group["d"] for group in grouped.param_groups)
        assert one > 1e-3
        assert effective_rates(grouped) == {"unet": one, "embeddings": other * 0.5}

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


class TestWarmupSchedule:
    @pytest.mark.parametrize(
        ("name", "settings", "theirs"),
        [
            ("constant", {}, {}),
            ("constant_with_warmup", {"warmup_steps": 5}, {}),
            ("linear", {"warmup_steps": 5, "decay": "linear", "total_steps": 20}, {}),
            ("cosine", {"warmup_steps": 5, "decay": "cosine", "total_steps": 20}, {}),
            ("cosine", {"decay": "cosine", "total_steps": 20}, {}),
            (
                "cosine_with_restarts",
                {"warmup_steps": 4, "decay": "cosine", "total_steps": 20, "cycles": 3},
                {"num_cycles": 3},
            ),
            (
                "polynomial",
                {"warmup_steps": 5, "decay": "polynomial", "total_steps": 20, "power": 2.0, "final": 1e-7 / 1e-3},
                {"power": 2.0},
            ),
        ],
    )
    def test_is_that_of_diffusers(self, name: str, settings: dict[str, Any], theirs: dict[str, Any]) -> None:
        from diffusers.optimization import get_scheduler

        rates = []
        for make in (
            lambda optimizer: WarmupSchedule(optimizer, **settings),
            lambda optimizer: get_scheduler(
                name, optimizer, num_warmup_steps=settings.get("warmup_steps", 0), num_training_steps=20, **theirs
            ),
        ):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
            schedule, seen = make(optimizer), []
            for _ in range(21):  # after the last step theirs rise again
                seen.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
            rates.append(seen)
        assert rates[0] == pytest.approx(rates[1], abs=1e-12)

    @pytest.mark.parametrize(
        "settings",
        [
            {"decay": "cosine"},
            {"decay": "linear", "warmup_steps": 5, "total_steps": 5},
            {"warmup_steps": -1},
            {"cycles": 0},
            {"final": 1.5},
            {"power": 0.0},
        ],
    )
    def test_settings_out_of_range(self, settings: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="WarmupSchedule"):
            WarmupSchedule(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), **settings)
