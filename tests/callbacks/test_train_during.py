"""Phases of a real module, resumed and on several processes, are in tests/modules and tests/test_pitfalls.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from prodigyopt import Prodigy
from torch.optim import SGD, AdamW, Optimizer

from lit_edm.callbacks import FreezeEmbeddings, TrainDuring
from lit_edm.callbacks.train_during import first_step_without
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.optim import GroupedProdigy

Make = Callable[..., Trainer]
UNET, TEXT, TOKENS = {"unet"}, {"text_encoders"}, {"embeddings"}
ALL = UNET | TEXT | TOKENS


class StopAfter(Callback):
    """Ends a run before its time, as a crash would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.steps


@pytest.mark.parametrize("optimizer", [AdamW, SGD, Prodigy, GroupedProdigy])
def test_phases_combine(three_groups: Any, trainer: Make, optimizer: type[Optimizer]) -> None:
    """Tokens alone, all, UNet and text encoders, UNet alone."""
    phases = [TrainDuring("unet", 0.25), TrainDuring("text_encoders", 0.25, 6), TrainDuring("embeddings", 0, 0.5)]
    module = three_groups(optimizer, weight_decay=0.1)
    trainer(*phases, max_steps=8, gradient_clip_val=0.1).fit(module)
    expected = [TOKENS] * 2 + [ALL] * 2 + [UNET | TEXT] * 2 + [UNET] * 2
    assert module.moved == expected
    assert module.clipped == expected, "what rests has no share in the clipped norm"
    assert module.rested == [ALL - names for names in expected], "the module is told before it computes"


@pytest.mark.parametrize(
    ("start", "stop", "steps"),
    [
        (0.0, 1.0, [*range(8)]),
        (0.5, 1.0, [4, 5, 6, 7]),
        (3, 5, [3, 4]),
        (0.125, 3, [1, 2]),
        (6, 1.0, [6, 7]),
        (6, 100, [6, 7]),
        (0.0, 0.1, [0]),
    ],
)
def test_fractions_and_numbers_of_steps(
    three_groups: Any, trainer: Make, start: float, stop: float, steps: list[int]
) -> None:
    module = three_groups()
    trainer(TrainDuring("unet", start, stop), max_steps=8).fit(module)
    assert [step for step, names in enumerate(module.moved) if "unet" in names] == steps


def test_two_parts_of_a_run_train_one_group(three_groups: Any, trainer: Make) -> None:
    module = three_groups()
    trainer(TrainDuring("unet", stop=0.25), TrainDuring("unet", start=0.75), max_steps=8).fit(module)
    assert [("unet" in names) for names in module.moved] == [True] * 2 + [False] * 4 + [True] * 2
    assert [("unet" in names) for names in module.rested] == [False] * 2 + [True] * 4 + [False] * 2


def test_optimizer_steps_are_counted_not_batches(three_groups: Any, trainer: Make) -> None:
    module = three_groups()
    trainer(TrainDuring("unet", 0.25, 0.5), max_steps=-1, max_epochs=1, accumulate_grad_batches=2).fit(module)
    assert [("unet" in names) for names in module.moved] == [index == 3 for index in range(8)]
    assert [("unet" in names) for names in module.rested] == [index not in (2, 3) for index in range(8)]


@pytest.mark.parametrize("stopped", [1, 3, 5, 7])
def test_a_resumed_run_is_in_the_phase_it_was_in(
    three_groups: Any, trainer: Make, tmp_path: Path, stopped: int
) -> None:
    def run(*callbacks: Callback, resume: Path | None = None) -> Any:
        module = three_groups(GroupedProdigy, d0=1e-3)
        part = trainer(FreezeEmbeddings(0.5), TrainDuring("unet", 2, 6), *callbacks, max_steps=8)
        part.fit(module, ckpt_path=resume)
        part.save_checkpoint(tmp_path / "last.ckpt")
        return module

    whole, first = run(), run(StopAfter(stopped))
    rest = run(resume=tmp_path / "last.ckpt")
    assert len(first.moved) == stopped
    assert [*first.moved, *rest.moved] == whole.moved
    assert all(a.equal(b) for a, b in zip(rest.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize(("start", "stop"), [(0.5, 0.5), (0.6, 0.4), (-0.1, 1), (0, 0), (20, 10), (float("nan"), 1)])
def test_a_part_of_no_length(start: float, stop: float) -> None:
    with pytest.raises(InputError, match=f"TrainDuring trains unet from {start} to {stop}; start must be"):
        TrainDuring("unet", start, stop)


@pytest.mark.parametrize(("start", "stop"), [(0.5, 3), (8, 100), (4, 0.5), (1.0, 20), (0.9, 1.0)])
def test_a_part_that_this_run_has_no_step_in(three_groups: Any, trainer: Make, start: float, stop: float) -> None:
    with pytest.raises(InputError, match=rf"TrainDuring never trains unet: {start} to {stop} is from step .* of 8"):
        trainer(TrainDuring("unet", start, stop), max_steps=8).fit(three_groups())


def test_mistakes_are_told_before_anything_slow(three_groups: Any, trainer: Make) -> None:
    class Encodes(three_groups):
        def on_fit_start(self) -> None:
            raise AssertionError("images would be encoded now")

    for phase, training in ((TrainDuring("unet", 9, 10), {}), (TrainDuring("unet", 0.5), {"max_steps": -1})):
        with pytest.raises(InputError):
            trainer(phase, **({"max_steps": 8, "max_epochs": -1} | training)).fit(Encodes())


def test_a_fraction_of_a_run_without_end(three_groups: Any, trainer: Make) -> None:
    endless = {"max_steps": -1, "max_epochs": -1}
    with pytest.raises(InputError, match=r"TrainDuring needs the run's length: set trainer\.max_steps or"):
        trainer(TrainDuring("unet", 0.5), **endless).fit(three_groups())


def test_the_end_of_a_run_without_end(three_groups: Any, trainer: Make) -> None:
    endless = {"max_steps": -1, "max_epochs": -1}
    with pytest.raises(InputError, match=r"TrainDuring never trains unet: 1\.0 to 20 is from step inf"):
        trainer(TrainDuring("unet", 1.0, 20), **endless).fit(three_groups())


def test_a_number_of_steps_of_a_run_without_end(three_groups: Any, trainer: Make) -> None:
    module = three_groups()
    trainer(TrainDuring("unet", 3), StopAfter(5), max_steps=-1, max_epochs=-1).fit(module)
    assert [("unet" in names) for names in module.moved] == [False] * 3 + [True] * 2


def test_a_group_that_is_not_trained(three_groups: Any, trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(three_groups, "parameter_groups", lambda self: {"unet": [self.unet], "embeddings": []})
    with pytest.raises(InputError, match="text_encoders, but the model trains unet, embeddings; leave the callback"):
        trainer(TrainDuring("text_encoders", 0.5)).fit(three_groups())


def test_a_group_that_is_not_trained_is_told_before_weights_are_loaded(
    three_groups: Any, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(self: LightningModule) -> None:
        raise AssertionError("weights would be loaded now")

    monkeypatch.setattr(three_groups, "trained_groups", lambda self: ["unet"], raising=False)
    monkeypatch.setattr(three_groups, "configure_model", too_late)
    with pytest.raises(InputError, match="TrainDuring is about embeddings, but the model trains unet; leave"):
        trainer(TrainDuring("embeddings", 0.5)).fit(three_groups())


def test_a_module_without_groups(pixels: Callable[..., LightningModule], patches: Any, trainer: Make) -> None:
    with pytest.raises(InputError, match="TrainDuring is about unet, but the model trains no groups"):
        trainer(TrainDuring("unet", 0.5)).fit(pixels(), patches())


@pytest.mark.parametrize(
    ("spans", "step"),
    [
        ({"unet": [], "embeddings": [(0, 2)]}, None),
        ({"embeddings": [(0, 2)]}, 2),
        ({"embeddings": [(1, 4)]}, 0),
        ({"embeddings": [(0, 2)], "unet": [(2, 4)]}, None),
        ({"embeddings": [(0, 1.5)], "unet": [(2.5, 4)]}, 2),
        ({"embeddings": [(0, 1), (3, 4)]}, 1),
        ({"embeddings": [(0, 9)]}, None),
        ({"embeddings": [(0, 3.5)], "unet": [(3.5, 4)]}, None),
    ],
)
def test_steps_that_train_nothing(spans: dict[str, list[tuple[float, float]]], step: int | None) -> None:
    assert first_step_without(spans, 4) == step


def test_a_run_with_steps_that_train_nothing_is_refused(tiny: Path, icons: Path, trainer: Any) -> None:
    module = SDXLModule(str(tiny), tokens={"TOK": 1}, adapter=None)
    data = CaptionedImagesDataModule(icons, resolution=16, batch_size=4)
    with pytest.raises(
        InputError, match=r"FreezeEmbeddings: step 2 of 4 would train none of embeddings; let the phases"
    ):
        trainer(FreezeEmbeddings(0.5)).fit(module, data)
