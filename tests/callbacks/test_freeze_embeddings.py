"""That tokens are bit-equal from the pivot on is in tests/modules/test_sdxl.py, on a real module."""

from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import Trainer
from prodigyopt import Prodigy
from torch.optim import SGD, AdamW, Optimizer

from lit_edm.callbacks import FreezeEmbeddings
from lit_edm.errors import InputError
from lit_edm.optim import GroupedProdigy


@pytest.fixture
def moves(three_groups: Any, trainer: Callable[..., Trainer]) -> Callable[..., list[bool]]:
    """Trains, and tells for every batch whether the embeddings moved."""

    def run(ti_frac: float, optimizer: type[Optimizer] = AdamW, **length: int) -> list[bool]:
        module = three_groups(optimizer)
        trainer(FreezeEmbeddings(ti_frac), **({"max_steps": 8} | length)).fit(module)
        return ["embeddings" in names for names in module.moved]

    return run


@pytest.mark.parametrize("optimizer", [AdamW, SGD, Prodigy, GroupedProdigy])
def test_embeddings_stop_at_ti_frac(moves: Callable[..., list[bool]], optimizer: type[Optimizer]) -> None:
    assert moves(0.25, optimizer) == [True] * 2 + [False] * 6


@pytest.mark.parametrize(("ti_frac", "steps"), [(0, 0), (0.001, 1), (1, 8)])
def test_the_ends(moves: Callable[..., list[bool]], ti_frac: float, steps: int) -> None:
    assert moves(ti_frac) == [True] * steps + [False] * (8 - steps)


def test_half_of_one_epoch_is_half_of_its_steps(moves: Callable[..., list[bool]]) -> None:
    assert moves(0.5, max_steps=-1, max_epochs=1) == [True] * 4 + [False] * 4


@pytest.mark.parametrize("ti_frac", [-0.1, 1.1, float("nan")])
def test_fraction_outside_its_range(ti_frac: float) -> None:
    with pytest.raises(InputError, match=r"FreezeEmbeddings\.ti_frac is .*in \[0, 1\]"):
        FreezeEmbeddings(ti_frac)


def test_a_run_without_end(moves: Callable[..., list[bool]]) -> None:
    with pytest.raises(InputError, match=r"FreezeEmbeddings needs .* set trainer\.max_steps or trainer\.max_epochs"):
        moves(0.5, max_steps=-1, max_epochs=-1)


def test_no_tokens(three_groups: Any, trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(three_groups, "parameter_groups", lambda self: {"unet": [self.unet]})
    with pytest.raises(InputError, match="FreezeEmbeddings is about embeddings, but the model trains unet; "):
        trainer(FreezeEmbeddings(0.5)).fit(three_groups())
