"""Steps are told apart by the batches that break them: a module whose loss and gradients batches decide."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from prodigyopt import Prodigy
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, DistributedSampler

from lit_edm.callbacks import ExponentialMovingAverage, SkipNonFinite, TrainDuring
from lit_edm.cli import main
from lit_edm.errors import InputError
from lit_edm.optim import GroupedProdigy

Make = Callable[..., Trainer]
GROUPS = ("unet", "text_encoders", "embeddings")


class Scaled(LightningModule):
    """Three groups of parameters; each batch says what its loss and the gradient of each group are multiplied by.

    Args:
        batches: Of each batch the factors on the loss and, at choice, on the gradients of some groups.
        optimizer: Creates the optimizer.
        settings: Of the optimizer.
    """

    def __init__(
        self, batches: list[dict[str, float]], optimizer: Callable[..., Optimizer] = AdamW, **settings: Any
    ) -> None:
        super().__init__()
        self.batches, self.optimizer, self.settings = batches, optimizer, settings
        self.unet, self.text_encoders, self.embeddings = (nn.Parameter(torch.ones(2)) for _ in range(3))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {name: [getattr(self, name)] for name in GROUPS}

    def set_trained(self, group: str, trained: bool) -> None: ...

    def on_train_start(self) -> None:
        for name, (parameter,) in self.parameter_groups().items():
            parameter.register_hook(lambda gradient, name=name: gradient * self.now.get(name, 1.0))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.now = batch["factors"]
        loss = (x_of(batch["number"]) * self.unet + self.text_encoders + self.embeddings).square().mean()
        # The gradient stays finite: that of a loss that is not need not be finite of itself.
        return loss + torch.tensor(batch["factors"].get("loss", 0.0))

    def configure_optimizers(self) -> Any:
        groups = [{"name": name, "params": parameters} for name, parameters in self.parameter_groups().items()]
        optimizer = self.optimizer(groups, **self.settings)
        return [optimizer], [{"scheduler": StepLR(optimizer, 1, gamma=0.9), "interval": "step"}]

    def train_dataloader(self) -> DataLoader[Any]:
        examples = [
            {"caption": [f"TOK {n}"], "number": n, "factors": factors} for n, factors in enumerate(self.batches)
        ]
        world = self.trainer.world_size
        sampler = DistributedSampler(examples, shuffle=False) if world > 1 else None  # type: ignore[arg-type]
        return DataLoader(examples, batch_size=None, sampler=sampler)  # type: ignore[arg-type]


def x_of(number: int) -> Tensor:
    """The data of a batch."""
    return torch.tensor([1.0, -2.0]) / (1 + number)


FINE: dict[str, float] = {}
BROKEN = [{"loss": nan}, {"loss": inf}, {"unet": nan}, {"embeddings": inf}, {"unet": 1e300}]


@contextmanager
def warned(*steps: int) -> Iterator[list[str]]:
    """Expects one line for each of these steps, which it returns."""
    lines: list[str] = []
    logger, handler = logging.getLogger("lit_edm.callbacks.skip_non_finite"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
    assert not any("\n" in line for line in lines)
    assert [int(line.split()[6]) for line in lines] == [*steps]


class States(Callback):
    """Keeps parameters and the optimizer's state after each batch."""

    def __init__(self) -> None:
        self.after: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        optimizer = trainer.optimizers[0].state_dict()
        for group in optimizer["param_groups"]:
            group.pop("lr")  # the schedule's
        self.after.append(deepcopy([pl_module.state_dict(), optimizer]))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one.equal(other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("optimizer", [AdamW, SGD, Prodigy, GroupedProdigy])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_skipped_step_moves_nothing(trainer: Make, optimizer: type[Optimizer], broken: dict[str, float]) -> None:
    settings = {"lr": 0.1, "momentum": 0.9} if optimizer is SGD else {}
    states, callback = States(), SkipNonFinite()
    module = Scaled([FINE, FINE, broken, FINE], optimizer, weight_decay=0.1, **settings)
    with warned(2):
        trainer(callback, states, gradient_clip_val=1.0).fit(module)
    assert same(states.after[1], states.after[2])
    assert not same(states.after[0][0], states.after[1][0])
    assert not same(states.after[2][0], states.after[3][0])
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert (callback.count, callback.recent) == (1, [2])


def by_hand(count: int, skipped: Sequence[int], optimizer: Callable[..., Optimizer]) -> tuple[list[Tensor], float]:
    """Trains without Lightning, some steps of which are not made; returns the weights and the last loss."""
    weights = [nn.Parameter(torch.ones(2)) for _ in GROUPS]
    steps = optimizer([{"name": name, "params": [weight]} for name, weight in zip(GROUPS, weights, strict=True)])
    schedule, loss = StepLR(steps, 1, gamma=0.9), torch.tensor(0.0)
    for number in range(count):
        if number not in skipped:
            loss = (x_of(number) * weights[0] + weights[1] + weights[2]).square().mean()
            steps.zero_grad()
            loss.backward()
            steps.step()
        schedule.step()
    return [weight.detach() for weight in weights], float(loss)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")  # torch counts calls of the optimizer
@pytest.mark.parametrize("optimizer", [AdamW, GroupedProdigy])
@pytest.mark.parametrize("broken", BROKEN)
def test_the_run_goes_on_as_one_without_the_step(
    trainer: Make, optimizer: type[Optimizer], broken: dict[str, float]
) -> None:
    """But for the schedule, which has had it."""
    module = Scaled([FINE, FINE, broken, FINE, FINE], optimizer)
    with warned(2):
        trainer(SkipNonFinite(), max_steps=5).fit(module)
    assert same(list(module.parameters()), by_hand(5, [2], optimizer)[0])


def test_finite_steps_are_bit_equal_to_those_of_a_run_without(trainer: Make) -> None:
    module, other = Scaled([FINE] * 4), Scaled([FINE] * 4)
    run = trainer(SkipNonFinite())
    run.fit(module)
    trainer().fit(other)
    assert same(module.state_dict(), other.state_dict())
    assert run.callback_metrics["train/skipped_steps"] == 0


@pytest.mark.parametrize("broken", BROKEN)
def test_one_batch_of_those_accumulated_skips_the_step(trainer: Make, broken: dict[str, float]) -> None:
    states = States()
    module = Scaled([FINE, FINE, broken, FINE, FINE, FINE], lr=0.1)
    with warned(1):
        trainer(SkipNonFinite(), states, accumulate_grad_batches=2, max_steps=3).fit(module)
    assert same(states.after[1][0], states.after[3][0])
    assert not same(states.after[3][0], states.after[5][0])
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("first", [True, False])
def test_what_rests_is_of_no_matter(trainer: Make, first: bool) -> None:
    """Wherever the callbacks stand."""
    phase, callback = TrainDuring("embeddings", stop=0.5), SkipNonFinite()
    callbacks = [callback, phase] if first else [phase, callback]
    module = Scaled([FINE, FINE, {"embeddings": nan}, FINE], lr=0.1)
    states = States()
    trainer(*callbacks, states).fit(module)
    assert callback.count == 0
    assert not same(states.after[1][0], states.after[2][0])
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("first", [True, False])
def test_an_average_stays_finite(trainer: Make, first: bool) -> None:
    average, callback = ExponentialMovingAverage(half_life=2), SkipNonFinite()
    callbacks = [callback, average] if first else [average, callback]
    with warned(1, 2):
        trainer(*callbacks).fit(Scaled([FINE, {"loss": nan}, {"unet": inf}, FINE]))
    assert all(value.isfinite().all() for value in average.average.values())


def test_counts_are_logged(trainer: Make) -> None:
    run = trainer(SkipNonFinite())
    with warned(1, 2):
        run.fit(Scaled([FINE, {"loss": nan}, {"unet": inf}, FINE]))
    assert run.callback_metrics["train/skipped_steps"] == 2


def test_warnings_say_what_and_of_which_captions(trainer: Make) -> None:
    with warned(0, 1) as lines:
        trainer(SkipNonFinite(), max_steps=2, accumulate_grad_batches=2).fit(
            Scaled([{"loss": nan}, FINE, FINE, {"unet": inf, "embeddings": nan}])
        )
    assert lines == [
        "skipped the optimizer step at step 0 of epoch 0, 1 of the last 100: the loss was nan and the gradient of "
        "unet, text_encoders, embeddings was not finite, with the captions 'TOK 0'",
        "skipped the optimizer step at step 1 of epoch 0, 2 of the last 100: the loss was finite and the gradient of "
        "unet, embeddings was not finite, with the captions 'TOK 2', 'TOK 3'",
    ]


class TestLimit:
    def test_one_step_too_many_ends_the_run(self, trainer: Make, tmp_path: Path) -> None:
        module = Scaled([FINE, FINE, *[{"loss": nan}] * 8], lr=0.01)
        keeper = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1)
        run = trainer(SkipNonFinite(limit=2), keeper, max_steps=10, enable_checkpointing=True)
        with warned(2, 3), pytest.raises(InputError) as ended:
            run.fit(module)
        _, last_loss = by_hand(2, [], partial(AdamW, lr=0.01))
        assert str(ended.value) == (
            "3 of the last 100 optimizer steps were skipped, at last that at step 4 of epoch 0, in which the loss was "
            "nan and the gradient of unet, text_encoders, embeddings was not finite, with the captions 'TOK 4'; the "
            f"last finite loss was {last_loss:g}, learning rates are unet 0.006561, text_encoders 0.006561, embeddings "
            "0.006561, trainer.precision is 32-true: lower model.init_args.optimizer.init_args.lr, or set "
            "trainer.gradient_clip_val to 1.0; these steps moved no weight: go on from "
            f"{keeper.best_model_path}, or from an older one if the step before was too large"
        )
        assert all(parameter.isfinite().all() for parameter in module.parameters())

    def test_steps_long_past_are_forgiven(self, trainer: Make) -> None:
        callback = SkipNonFinite(limit=1, window=3)
        with warned(0, 3, 6) as lines:
            trainer(callback, max_steps=10).fit(Scaled([{"loss": nan}, FINE, FINE] * 3 + [FINE]))
        assert callback.count == 3
        assert all("of epoch 0, 1 of the last 3: " in line for line in lines)

    @pytest.mark.parametrize(("limit", "window"), [(-1, 10), (10, 10), (0, 0)])
    def test_out_of_range(self, limit: int, window: int) -> None:
        with pytest.raises(InputError, match=f"limit={limit}, window={window}; limit must be 0 or more, below window"):
            SkipNonFinite(limit, window)

    def test_counts_go_on_where_a_checkpoint_was(self, trainer: Make, tmp_path: Path) -> None:
        first = trainer(SkipNonFinite(limit=2), max_steps=2)
        with warned(1):
            first.fit(Scaled([FINE, {"loss": nan}]))
        first.save_checkpoint(tmp_path / "last.ckpt")
        kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["SkipNonFinite"]
        assert kept == {"count": 1, "recent": [1], "last_loss": 4.5}

        rest = trainer(SkipNonFinite(limit=2), max_steps=6)
        batches = [{"unet": nan}, {"loss": inf}, FINE, FINE]  # the loader begins anew
        with warned(2), pytest.raises(InputError, match=r"^3 of the last 100 .* step 3 .* finite loss was [0-9.]+, "):
            rest.fit(Scaled([*batches, FINE, FINE]), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


class TestWeights:
    def test_broken_before_the_run(self, trainer: Make) -> None:
        module = Scaled([FINE] * 4)
        module.text_encoders.data[1] = nan
        with pytest.raises(
            InputError, match="the weight text_encoders is NaN or infinite before the first step: go on"
        ):
            trainer(SkipNonFinite()).fit(module)

    def test_frozen_ones_too(self, trainer: Make) -> None:
        module = Scaled([FINE] * 4)
        module.base = nn.Linear(2, 2).requires_grad_(False).half()
        module.base.bias.data[0] = inf
        with pytest.raises(InputError, match=r"the weight base\.bias is"):
            trainer(SkipNonFinite()).fit(module)

    def test_in_a_checkpoint(self, trainer: Make, tmp_path: Path) -> None:
        module = Scaled([FINE] * 4)
        run = trainer(max_steps=2)
        run.fit(module)
        module.unet.data[0] = inf
        run.save_checkpoint(tmp_path / "broken.ckpt")
        with pytest.raises(InputError, match="the weight unet is NaN or infinite before"):
            trainer(SkipNonFinite()).fit(Scaled([FINE] * 4), ckpt_path=tmp_path / "broken.ckpt")

    def test_broken_by_other_hands(self, trainer: Make) -> None:
        class Break(Callback):
            def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
                pl_module.unet.data[0] = nan

        with pytest.raises(
            InputError, match="the weight unet is NaN or infinite at step 1 of epoch 0, in which the loss"
        ):
            trainer(SkipNonFinite(), Break()).fit(Scaled([FINE] * 4))


class HalfPrecision(MixedPrecision):
    """Stands in for 16-mixed on a GPU: its scaler, on the CPU, in float32."""

    def __init__(self, scale: float = 2.0**16) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))  # type: ignore[attr-defined]

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


class TestScaler:
    def test_overflow_of_a_finite_loss_is_its_own_business(self, trainer: Make) -> None:
        states, callback = States(), SkipNonFinite(limit=0)
        run = trainer(callback, states, max_steps=4, plugins=[HalfPrecision()])
        run.fit(Scaled([{"unet": inf}, {"unet": nan}, FINE, FINE]))
        assert callback.count == 0
        assert same(states.after[0][0], states.after[1][0])
        assert not same(states.after[1][0], states.after[2][0])
        assert run.precision_plugin.scaler.get_scale() == 2.0**14  # type: ignore[attr-defined]

    def test_a_loss_that_is_not_finite_counts(self, trainer: Make) -> None:
        states, callback = States(), SkipNonFinite()
        with warned(1, 2):
            trainer(callback, states, plugins=[HalfPrecision()]).fit(Scaled([FINE, {"loss": nan}, {"loss": inf}, FINE]))
        assert callback.count == 2
        assert same(states.after[0][0], states.after[2][0])
        assert not same(states.after[2][0], states.after[3][0])

    def test_no_scale_left_to_lower_counts(self, trainer: Make) -> None:
        callback = SkipNonFinite()
        with warned(1, 2):
            trainer(callback, plugins=[HalfPrecision(2.0)]).fit(Scaled([{"unet": nan}] * 3 + [FINE]))
        assert callback.count == 2

    def test_remedy(self, trainer: Make) -> None:
        with pytest.raises(InputError, match=r"set trainer\.precision to bf16-mixed, or model\.init_args\.vae to "):
            trainer(SkipNonFinite(limit=0), plugins=[HalfPrecision()]).fit(Scaled([{"loss": nan}] * 4))


class AlikeOnBoth(SkipNonFinite):
    """Fails where the processes differ; keeps what they have, and how they end."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *others: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *others)
        mine = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        every: Any = trainer.strategy.all_gather(mine)
        assert mine.isfinite().all()
        assert every[0].equal(every[1])
        with Path(trainer.default_root_dir, f"after_{trainer.global_rank}").open("a") as file:
            file.write(f"{self.count} {mine.tolist()}\n")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        try:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
        except InputError as error:
            Path(trainer.default_root_dir, f"end_{trainer.global_rank}").write_text(str(error))
            trainer.strategy.barrier()  # the first to end ends the other
            raise


@pytest.mark.parametrize("broken", [{"loss": nan}, {"loss": inf}, {"unet": nan}])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_decide_alike(trainer: Make, tmp_path: Path, broken: dict[str, float], accumulate: int) -> None:
    """Process 1 has a broken batch in step 1; both skip the step."""
    batches = [FINE] * (8 * accumulate)
    batches[2 * accumulate + 1] = broken  # processes take turns
    both = {"strategy": "ddp_fork", "devices": 2, "accumulate_grad_batches": accumulate}
    trainer(AlikeOnBoth(), **both).fit(Scaled(batches, lr=0.1))
    each = [(tmp_path / f"after_{rank}").read_text().splitlines() for rank in range(2)]
    assert each[0] == each[1]
    counts, weights = zip(*[line.split(" ", 1) for line in each[0][accumulate - 1 :: accumulate]], strict=True)
    assert counts == ("0", "1", "1", "1")
    assert [a == b for a, b in pairwise(weights)] == [True, False, False]


def test_processes_end_alike(trainer: Make, tmp_path: Path) -> None:
    """With the same line, which names the caption that process 1 alone has seen."""
    run = trainer(AlikeOnBoth(limit=0), strategy="ddp_fork", devices=2)
    with pytest.raises(Exception, match=r"InputError: 1 of the last 100"):
        run.fit(Scaled([FINE, FINE, FINE, {"loss": nan}]))
    ends = {(tmp_path / f"end_{rank}").read_text() for rank in range(2)}
    assert len(ends) == 1
    assert "at step 1 of epoch 0, in which the loss was nan and the gradient of unet, text_encoders" in (
        end := ends.pop()
    )
    assert "with the captions 'TOK 3'; the last finite loss was" in end


def test_edm_module(trainer: Make, patches: Any, pixels: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One of eleven images is broken, in one of the four batches of each epoch."""

    class OneBroken(patches):
        def read(self) -> tuple[Any, Any]:
            examples, held_out = super().read()
            examples[0]["image"][0, 1, 2] = nan
            return examples, held_out

    callback, module = SkipNonFinite(), pixels()
    before = deepcopy(module.state_dict())
    trainer(callback, max_steps=-1, max_epochs=3).fit(module, OneBroken(held_out=0.0))
    assert [step // 4 for step in callback.recent] == [0, 1, 2]
    lines = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert all(line.endswith("the loss was nan and the gradient of network was not finite") for line in lines)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert not same(before, module.state_dict())


def test_command_line(tiny: Path, icons: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate that is much too large."""
    config = {
        "model": {
            "class_path": "SDXLModule",
            "init_args": {
                "pretrained": str(tiny),
                "tokens": {"TOK": 1},
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e25}},
            },
        },
        "data": {"class_path": "CaptionedImagesDataModule", "init_args": {"root": str(icons), "resolution": 16}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 10,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [{"class_path": "SkipNonFinite", "init_args": {"limit": 1}}],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(tmp_path / "config.yaml")])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("lit-edm: error: 2 of the last 100 optimizer steps were skipped, at last that at step 2 of ")
    assert "with the captions 'a 3d icon in the style of TOK, " in said
    assert "learning rates are unet 1e+25, embeddings 1e+25, trainer.precision is 32-true: lower model." in said
    assert said.endswith("these steps moved no weight; no checkpoint was written")
