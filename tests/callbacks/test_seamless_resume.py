from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_edm.callbacks import SeamlessResume

Make = Callable[..., Any]


@pytest.mark.parametrize(("steps", "again"), [(5, True), (4, False)])
def test_the_end_of_a_run_is_kept_and_goes_on(
    pixels: Make, patches: Make, trainer: Make, tmp_path: Path, steps: int, again: bool
) -> None:
    """Also where it is no step to save at; the run of 7 steps ends in mid-epoch, like the others."""

    def fit(name: str, max_steps: int, ckpt_path: Path | None = None) -> tuple[Path, list[str]]:
        folder, saved = tmp_path / name, []
        keep = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
        run = trainer(SeamlessResume(), keep, max_steps=max_steps, enable_checkpointing=True)
        save = run.save_checkpoint
        run.save_checkpoint = lambda path, *a, **b: (saved.append(Path(path).name), save(path, *a, **b))
        run.fit(pixels(), patches(batch_size=2), ckpt_path=ckpt_path)
        return folder / "last.ckpt", saved

    (first, saved), (whole, _) = fit("first", steps), fit("whole", 7)
    assert saved.count("last.ckpt") == 2 + again
    rest, _ = fit("rest", 7, first)
    end, expected = (torch.load(path, weights_only=True) for path in (rest, whole))
    assert end["global_step"] == 7
    for name, value in expected["state_dict"].items():
        assert end["state_dict"][name].equal(value), name
