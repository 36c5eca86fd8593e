from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.utils.data import DataLoader

from lit_edm.batch import Batch
from lit_edm.callbacks import ValidationLoss
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.edm import DiffusionLoss, EDMLoss, EDMWeighting, LearnedWeighting, SNRWeighting
from lit_edm.errors import InputError
from lit_edm.modules import EDMModule, SDXLModule
from lit_edm.sdxl import LoRA
from lit_edm.seeds import seed_of

Make = Callable[..., Any]


def validate(trainer: Make, module: EDMModule, data: Any, **settings: Any) -> dict[str, float]:
    (logged,) = trainer(ValidationLoss(**settings)).validate(module, data, verbose=False)
    return dict(logged)


def test_against_the_loss_written_out(pixels: Make, patches: Make, trainer: Make) -> None:
    """Image by image, with the noise that belongs to each; batches of 3 and 1 weigh as 3 and 1."""
    module, sigmas = pixels().eval(), [0.1, 0.5, 3.0]
    logged = validate(trainer, module, patches(), sigmas=sigmas, seed=7)
    data = patches()
    data.setup("validate")
    losses = torch.zeros(len(data.val_set), 3)
    for index, example in enumerate(data.val_set):
        for level, sigma in enumerate(sigmas):
            generator = torch.Generator().manual_seed(seed_of(7, level, index))
            x = example["image"] + sigma * torch.randn(1, 4, 4, generator=generator)
            denoise = module.denoise({"image": x[None], "label": torch.tensor([example["label"]])})
            error = (denoise(x[None], torch.tensor([sigma])) - example["image"]).square().mean()
            losses[index, level] = (1 / sigma**2 + 1 / 0.25) * error
    expected = {
        f"val/loss_sigma_{sigma:g}": value for sigma, value in zip(sigmas, losses.mean(0).tolist(), strict=True)
    }
    assert logged == pytest.approx(expected | {"val/loss": losses.mean().item()}, rel=1e-5)


def test_is_independent_of_batches_workers_and_the_training_generator(
    pixels: Make, patches: Make, trainer: Make
) -> None:
    values = []
    for seed, settings in enumerate(({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 4, "num_workers": 1})):
        torch.manual_seed(seed)
        values.append(validate(trainer, pixels(), patches(**settings)))
        assert values[-1] == pytest.approx(values[0], rel=1e-5)
    assert len(values[0]) == 9
    assert validate(trainer, pixels(), patches(), seed=1)["val/loss"] != pytest.approx(values[0]["val/loss"], rel=1e-3)


def test_default_levels_span_what_the_module_knows(pixels: Make) -> None:
    levels = torch.tensor(ValidationLoss().levels(pixels(sigma_min=0.01, sigma_max=10.0)))
    assert levels[[0, -1]].tolist() == pytest.approx([0.01, 10.0])
    torch.testing.assert_close(levels.log().diff(), torch.full((7,), torch.tensor(1000.0).log() / 7))


def test_a_checkpoint_is_chosen_by_it(pixels: Make, patches: Make, trainer: Make, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=1)
    module = pixels(optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    run = trainer(ValidationLoss(), best, max_steps=6, enable_checkpointing=True)
    run.fit(module, patches())
    assert best.best_model_score is not None
    module.load_state_dict(torch.load(best.best_model_path)["state_dict"])
    assert validate(trainer, module, patches())["val/loss"] == pytest.approx(best.best_model_score.item(), rel=1e-5)


class TestWeighting:
    def test_learns_nothing(self, pixels: Make, patches: Make, trainer: Make) -> None:
        plain = validate(trainer, pixels(loss=EDMLoss(weighting=EDMWeighting(0.5))), patches())
        weighting = LearnedWeighting(EDMWeighting(0.5))
        torch.nn.init.normal_(weighting.weight)
        assert validate(trainer, pixels(loss=EDMLoss(weighting=weighting)), patches()) == pytest.approx(plain)

    def test_may_be_named(self, pixels: Make, patches: Make, trainer: Make) -> None:
        at = {"sigmas": [0.5]}
        ours = validate(trainer, pixels(), patches(), **at)["val/loss"]
        other = validate(trainer, pixels(), patches(), **at, weighting=SNRWeighting())["val/loss"]
        assert other == pytest.approx(ours / 2)  # 1 / 0.5^2 against 1 / 0.5^2 + 1 / 0.5^2

    def test_must_be_named_for_a_loss_without_one(self, pixels: Make, patches: Make, trainer: Make) -> None:
        class Plain(DiffusionLoss):
            def __call__(self, denoise: Any, clean: torch.Tensor) -> torch.Tensor:
                return clean.mean((1, 2, 3))

            def stateful_parts(self) -> list[torch.nn.Module]:
                return []

        with pytest.raises(InputError, match=r"ValidationLoss\.weighting: name one, for Plain has none"):
            validate(trainer, pixels(loss=Plain()), patches())

        class Encodes(EDMModule):
            def on_fit_start(self) -> None:
                raise AssertionError("images would be encoded now")

        module = pixels(loss=Plain())
        module.__class__ = Encodes
        with pytest.raises(InputError, match=r"ValidationLoss\.weighting: name one"):
            trainer(ValidationLoss()).fit(module, patches())


@pytest.mark.parametrize("sigmas", [[], [0.0, 1.0], [-1.0]])
def test_levels_that_are_none(sigmas: list[float]) -> None:
    with pytest.raises(InputError, match=r"ValidationLoss\.sigmas is .*; name noise levels above 0"):
        ValidationLoss(sigmas)


def test_of_sdxl_with_a_vae_that_samples(tiny: Path, icons: Path, tmp_path: Path, trainer: Make) -> None:
    for index in range(3):
        Image.effect_noise((16, 16), 50 + index).convert("RGB").save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"TOK number {index}")
    module = SDXLModule(str(tiny), tokens={"TOK": 1}, adapter=LoRA(rank=2))
    logged = []
    for batch_size in (1, 2):
        data = CaptionedImagesDataModule(icons, resolution=16, batch_size=batch_size, val_root=tmp_path)
        torch.manual_seed(batch_size)
        logged.append(validate(trainer, module, data))
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    assert {"val/loss", "val/loss_sigma_0.0292", "val/loss_sigma_14.6"} <= logged[0].keys()
    run = trainer(ValidationLoss(), max_steps=2, val_check_interval=1, precision="bf16-mixed")
    run.fit(module, data)
    assert run.callback_metrics["val/loss"] == pytest.approx(logged[0]["val/loss"], rel=0.2)


def test_training_draws_what_it_would_have_drawn(tiny: Path, batch: Batch) -> None:
    module = SDXLModule(str(tiny))
    module.configure_model()
    torch.manual_seed(3)
    losses = ValidationLoss([1.0]).losses(module, dict(batch), [0, 1])
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert torch.rand(()).equal(drawn)
    torch.manual_seed(4)
    assert ValidationLoss([1.0]).losses(module, dict(batch), [0, 1]).equal(losses)
    assert not module.encode(batch).equal(module.encode(batch)), "although the VAE samples"


def test_a_run_without_held_out_images(pixels: Make, patches: Make, trainer: Make) -> None:
    for data in (patches(held_out=0.0), DataLoader(patches().read()[0], 3)):
        run = trainer(ValidationLoss(), max_steps=2)
        run.fit(pixels(), data)
        assert "val/loss" not in run.callback_metrics


def test_without_a_folder_of_held_out_images(tiny: Path, icons: Path, trainer: Make) -> None:
    data = CaptionedImagesDataModule(icons, resolution=16)
    with pytest.raises(InputError, match=r"ValidationLoss: there are no held-out images; name a folder .*val_root"):
        trainer(ValidationLoss()).fit(SDXLModule(str(tiny)), data)
    trainer(ValidationLoss(), limit_val_batches=0, max_steps=1).fit(SDXLModule(str(tiny)), data)
