import json
import os
import random
import re
import shutil
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image
from prodigyopt import Prodigy
from safetensors.torch import save_file
from torch.nn import functional

from lit_edm.batch import Batch, ClassImageRequest
from lit_edm.cache import MemoryCache
from lit_edm.callbacks import FreezeEmbeddings, TrainDuring
from lit_edm.data import CaptionedImagesDataModule, ClassImages, TeacherPrior
from lit_edm.edm import (
    DPMSolverSampler,
    EDMLoss,
    EDMWeighting,
    LearnedWeighting,
    LogNormal,
    MinSNRWeighting,
    SNRWeighting,
    TimestepSchedule,
    UniformKarras,
    UniformTimesteps,
)
from lit_edm.edm.draws import unit_noise_like
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.modules.prior import blank_batch, unit_noise
from lit_edm.sdxl import FullFinetune, LoRA
from lit_edm.sdxl.memory import kept_by_unet

CPU = torch.device("cpu")


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


def prodigy(params: Any) -> torch.optim.Optimizer:
    return Prodigy(params, lr=1.0, weight_decay=0.01, d0=1e-3)


def module_of(base: Path, **settings: Any) -> SDXLModule:
    return SDXLModule(str(base), tokens={"TOK": 2}, adapter=LoRA(rank=2), **settings)


def data_of(icons: Path, **settings: Any) -> CaptionedImagesDataModule:
    return CaptionedImagesDataModule(icons, resolution=16, batch_size=4, **settings)


def trainer_of(*callbacks: Callback, **settings: Any) -> Trainer:
    settings = {"max_steps": 4, "logger": False, "enable_checkpointing": False} | settings
    return Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **settings
    )


def trained_values(module: SDXLModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


class Recorder(Callback):
    """Keeps the new embeddings and all trained values after each step, and the losses."""

    def __init__(self) -> None:
        self.embeddings: list[torch.Tensor] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        self.start = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.embeddings.append(self.read(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: SDXLModule, outputs: Any, *_: Any) -> None:
        self.embeddings.append(self.read(pl_module))
        self.losses.append(float(outputs["loss"]))

    def read(self, module: SDXLModule) -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in module.embedding_parameters()])


@pytest.mark.parametrize("optimizer", [adamw, prodigy])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_tokens_are_bit_equal_from_the_pivot_on(tiny: Path, icons: Path, optimizer: Any, accumulate: int) -> None:
    module, recorder = module_of(tiny, optimizer=optimizer), Recorder()
    trainer = trainer_of(FreezeEmbeddings(0.5), recorder, max_steps=6, accumulate_grad_batches=accumulate)
    trainer.fit(module, data_of(icons, repeats=3))
    steps = recorder.embeddings[::accumulate]
    moved = [not a.equal(b) for a, b in pairwise(steps)]
    assert moved == [True] * 3 + [False] * 3
    changed = {name for name, p in module.named_parameters() if not p.equal(recorder.start[name])}
    assert changed == {name for name, p in module.named_parameters() if p.requires_grad}  # the base stays as it was


@pytest.mark.parametrize(("ti_frac", "moves"), [(0.0, 0), (1.0, 4)])
def test_the_pivot_at_the_ends(tiny: Path, icons: Path, ti_frac: float, moves: int) -> None:
    recorder = Recorder()
    trainer_of(FreezeEmbeddings(ti_frac), recorder).fit(module_of(tiny), data_of(icons))
    assert sum(not a.equal(b) for a, b in pairwise(recorder.embeddings)) == moves


def test_only_adapter_and_new_rows_are_trained(tiny: Path) -> None:
    module = module_of(tiny)
    module.configure_model()
    groups = module.configure_optimizers().param_groups
    assert [group["name"] for group in groups] == ["unet", "embeddings"]
    assert module.denoiser.unet.training, "adapters would not drop out"
    assert sorted(p.numel() for p in groups[1]["params"]) == [2 * 32, 2 * 48]
    in_groups = {id(p) for group in groups for p in group["params"]}
    assert in_groups == {id(p) for p in module.parameters() if p.requires_grad}
    assert all("lora_" in name or name.endswith("rows") for name in trained_values(module))


def test_embeddings_lr(tiny: Path) -> None:
    cases = ((adamw, 0.5, [1e-3, 0.5]), (adamw, 0.0, [1e-3, 0.0]), (adamw, None, [1e-3] * 2), (prodigy, None, [1, 1]))
    for optimizer, embeddings_lr, rates in cases:
        module = module_of(tiny, optimizer=optimizer, embeddings_lr=embeddings_lr)
        module.configure_model()
        assert [group["lr"] for group in module.configure_optimizers().param_groups] == rates


def test_the_schedule_steps_with_the_optimizer(tiny: Path, icons: Path) -> None:
    module = module_of(tiny, optimizer=adamw, lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, 4))
    trainer_of(accumulate_grad_batches=2, max_steps=2).fit(module, data_of(icons))
    assert [group["lr"] for group in module.optimizers().param_groups] == pytest.approx([0.5e-3] * 2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_trained_values_and_their_state_are_float32(tiny: Path, icons: Path, precision: Any) -> None:
    module = module_of(tiny, optimizer=adamw)
    trainer_of(precision=precision).fit(module, data_of(icons))
    assert {p.dtype for p in trained_values(module).values()} == {torch.float32}
    states = module.optimizers().state.values()
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}
    half = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    frozen = [p for name, p in module.named_parameters() if not p.requires_grad and not name.startswith("latents.")]
    assert {p.dtype for p in frozen} == {half}
    assert module.latents.vae.dtype == torch.float32


def test_true_half_precision_is_refused(tiny: Path, icons: Path) -> None:
    with pytest.raises(InputError, match=r"trainer\.precision is bf16-true; use one of 32-true, bf16-mixed, 16-mixed"):
        trainer_of(precision="bf16-true").fit(module_of(tiny), data_of(icons))


def test_half_precision_hardly_changes_the_loss(tiny: Path, icons: Path) -> None:
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        recorder = Recorder()
        seed_everything(3, verbose=False)
        trainer_of(recorder, precision=precision).fit(module_of(tiny), data_of(icons))
        losses[precision] = torch.tensor(recorder.losses)
    torch.testing.assert_close(losses["bf16-mixed"], losses["32-true"], rtol=0.03, atol=0)


def test_training_loss_is_plain_eps_mse(tiny: Path, batch: Batch) -> None:
    """The default loss against the usual training loop written out: add noise in eps form, predict, take the MSE."""
    module = module_of(tiny)
    module.configure_model()
    latents = module.encode(batch)
    noise_law, betas = UniformTimesteps(), torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)
    torch.manual_seed(5)
    sigma, noise = noise_law(2, latents.device), torch.randn(latents.shape)
    t = torch.tensor([int((((1 - alpha_bar) / alpha_bar).sqrt() - s).abs().argmin()) for s in sigma])
    a = alpha_bar[t].float().view(-1, 1, 1, 1)
    conditioning = module.conditioner(batch["caption"], module.time_ids(batch))
    added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
    x_t = a.sqrt() * latents + (1 - a).sqrt() * noise
    predicted = module.denoiser.unet(x_t, t, conditioning.context, added_cond_kwargs=added).sample
    mse = functional.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
    snr = (a / (1 - a)).flatten()
    for weighting, expected in (
        (SNRWeighting(), mse),
        (MinSNRWeighting(5.0, 1.0), mse * snr.clamp(max=5.0) / snr),
    ):
        torch.manual_seed(5)
        ours = EDMLoss(noise_law, weighting)(module.denoise(batch), latents)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("base", "loss"),
    [
        ("tiny_v", EDMLoss(UniformTimesteps(), MinSNRWeighting(5.0, 1.0))),
        ("tiny", EDMLoss(LogNormal(0.483, 1.194, 0.0292, 14.61), EDMWeighting(1.0))),
        ("tiny_edm", EDMLoss(LogNormal(), EDMWeighting(0.5))),
        ("tiny_edm", EDMLoss(LogNormal(), MinSNRWeighting(5.0, 0.5))),
    ],
)
def test_every_kind_of_base_trains(base: str, loss: EDMLoss, icons: Path, request: pytest.FixtureRequest) -> None:
    recorder, module = Recorder(), module_of(request.getfixturevalue(base), loss=loss)
    trainer_of(recorder).fit(module, data_of(icons))
    assert torch.isfinite(torch.tensor(recorder.losses)).all()
    assert all(not value.equal(recorder.start[name]) for name, value in trained_values(module).items())


def test_time_ids_are_height_first_and_of_the_batch(tiny: Path, batch: Batch) -> None:
    module = module_of(tiny)
    module.configure_model()
    wide: Batch = {**batch, "image": torch.zeros(2, 3, 16, 24)}
    for some in (wide, {**batch, "moments": module.latents.moments(wide["image"])}):
        some.pop("image", None) if "moments" in some else None
        assert module.time_ids(some).tolist() == [[1023, 768, 0, 3, 16, 24], [3001, 2000, 7, 0, 16, 24]]


def test_gradient_checkpointing_changes_memory_alone(tiny: Path, batch: Batch) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = module_of(tiny, gradient_checkpointing=checkpointing, text_encoder_adapter=LoRA(rank=2))
        module.configure_model()
        assert module.denoiser.unet.is_gradient_checkpointing == checkpointing
        assert [e.is_gradient_checkpointing for e in module.conditioner.encoders] == [checkpointing] * 2
        torch.manual_seed(1)
        module.loss(module.denoise(batch), module.encode(batch)).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    assert gradients[0].numel() > 0
    torch.testing.assert_close(*gradients)


class TestCheckpointingWithABudget:
    """Of the UNet's activations, in GiB: the fewest and cheapest blocks are computed again so that it fits."""

    def test_trains_the_same(self, tiny: Path, icons: Path) -> None:
        found, blocks = [], []
        for checkpointing in (False, 0.002, 0.001, True):
            seed_everything(3, verbose=False)
            module, recorder = module_of(tiny, gradient_checkpointing=checkpointing), Recorder()
            trainer_of(recorder).fit(module, data_of(icons))
            found.append([*recorder.losses, *trained_values(module).values()])
            blocks.append(len(module.computed_again or ()))
        assert 0 < blocks[1] < blocks[2]
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=0, atol=0)

    def test_what_a_batch_keeps_is_within_it(self, tiny: Path, icons: Path) -> None:
        module = module_of(tiny, gradient_checkpointing=0.002)
        trainer_of(max_steps=1).fit(module, data_of(icons))
        assert module.denoiser.unet.is_gradient_checkpointing
        kept = kept_by_unet(module.denoiser.unet, torch.float32, (4, 4, 8, 8), learns_text=True)
        assert kept is not None
        assert 0.0015 < kept / 2**30 <= 0.002
        images = data_of(icons)
        images.batch_size = 1
        trainer_of(max_steps=1).fit(module, images)
        assert not module.denoiser.unet.is_gradient_checkpointing, "another run's batches are small enough"

    def test_is_refused_before_weights_are_loaded(self, tiny: Path, icons: Path) -> None:
        module = module_of(tiny, gradient_checkpointing=0.0001)
        with pytest.raises(InputError, match=r"is 0\.0001 GiB, but the UNet keeps 0\.01 of a batch of 4"):
            trainer_of().fit(module, data_of(icons))
        assert not hasattr(module, "denoiser")

    def test_wants_to_know_the_batch(self, tiny: Path, batch: Batch) -> None:
        module = module_of(tiny, gradient_checkpointing=2.0)
        with pytest.raises(InputError, match="the data module tells no batch_size"):
            trainer_of().fit(module, [batch])

    def test_all_is_computed_again_until_then(self, tiny: Path) -> None:
        module = module_of(tiny, gradient_checkpointing=2.0)
        module.configure_model()
        assert module.denoiser.unet.is_gradient_checkpointing
        assert all(encoder.is_gradient_checkpointing for encoder in module.conditioner.encoders)


def test_learned_parts_of_the_loss_are_trained_without_decay_and_saved(tiny: Path, icons: Path, tmp_path: Path) -> None:
    loss = EDMLoss(UniformTimesteps(), LearnedWeighting(EDMWeighting(1.0)))
    module = module_of(tiny, loss=loss, optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1))
    trainer = trainer_of()
    trainer.fit(module, data_of(icons))
    group = module.optimizers().param_groups[-1]
    assert (group["name"], group["weight_decay"]) == ("loss", 0.0)
    assert any(p.abs().max() > 0.1 for p in group["params"])
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt")["state_dict"]
    assert {name for name in saved if name.startswith("loss_parts.")} == {
        f"loss_parts.{name}" for name in module.loss_parts.state_dict()
    }


class TestCheckpoint:
    def test_holds_what_is_trained_and_resumes(self, tiny: Path, icons: Path, tmp_path: Path) -> None:
        module = module_of(tiny, optimizer=adamw)
        trainer = trainer_of(max_steps=2)
        trainer.fit(module, data_of(icons))
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        saved = torch.load(tmp_path / "x.ckpt")
        assert saved["state_dict"].keys() == trained_values(module).keys()
        again, recorder = module_of(tiny, optimizer=adamw), Recorder()
        trainer_of(recorder, max_steps=3).fit(again, data_of(icons), ckpt_path=tmp_path / "x.ckpt")
        assert all(recorder.start[name].equal(value) for name, value in trained_values(module).items())
        assert len(recorder.losses) == 1

    def test_of_another_adapter_is_refused(self, tiny: Path, icons: Path, tmp_path: Path) -> None:
        trainer = trainer_of(max_steps=1)
        trainer.fit(module_of(tiny), data_of(icons))
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        other = SDXLModule(str(tiny), tokens={"TOK": 2}, adapter=LoRA(rank=2, target_modules=("to_q",)))
        with pytest.raises(InputError, match="trained with another adapter or other tokens"):
            trainer_of().fit(other, data_of(icons), ckpt_path=tmp_path / "x.ckpt")


def test_random_numbers_follow_from_seed_step_and_rank(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loop:
        total_batch_idx = 0

    class FakeTrainer:
        world_size = 2
        accumulate_grad_batches = 1

        class fit_loop:  # noqa: N801
            epoch_loop = Loop()

    module = module_of(tiny)
    module.configure_model()
    draws: dict[tuple[int, int, int], set[tuple[float, ...]]] = {}
    shared: dict[tuple[int, int], list[float]] = {}
    for seed in (0, 1):
        for step in (0, 1):
            for rank in (0, 1):
                monkeypatch.setitem(os.environ, "PL_GLOBAL_SEED", str(seed))
                monkeypatch.setattr(Loop, "total_batch_idx", step)
                monkeypatch.setattr(SDXLModule, "trainer", FakeTrainer())
                monkeypatch.setattr(module, "_trainer", FakeTrainer())
                monkeypatch.setattr(SDXLModule, "global_rank", rank)
                for _ in range(2):
                    module.on_train_batch_start({}, 0)  # type: ignore[typeddict-item]
                    drawn = draws.setdefault((seed, step, rank), set())
                    drawn.add((float(torch.rand(())), random.random(), np.random.random()))  # noqa: NPY002
                with module.sharing({}, 1):
                    shared.setdefault((seed, step), []).append(float(unit_noise_like(torch.zeros(1))))
    assert all(len(drawn) == 1 for drawn in draws.values())
    assert len({number for drawn in draws.values() for numbers in drawn for number in numbers}) == 3 * 8
    assert len({number for of_ranks in shared.values() for number in of_ranks}) == 2 * 4  # a row each, of one stream


class TestSetup:
    def test_placeholder_in_no_caption(self, tiny: Path, icons: Path) -> None:
        module = SDXLModule(str(tiny), tokens={"TOK": 2, "HAT": 1})
        with pytest.raises(InputError, match=r"model\.init_args\.tokens: no caption holds the word HAT"):
            trainer_of().fit(module, data_of(icons))

    def test_resolution(self, tiny: Path, icons: Path) -> None:
        with pytest.raises(InputError, match=r"data\.init_args\.resolution or .*: images of 33 px a side"):
            trainer_of().fit(module_of(tiny), CaptionedImagesDataModule(icons, resolution=33))

    def test_initializer_of_no_placeholder(self, tiny: Path) -> None:
        with pytest.raises(InputError, match=r"initializers: HAT is not one of model\.init_args\.tokens"):
            module_of(tiny, initializers={"HAT": "hat"})

    def test_another_vae_with_other_statistics_warns(self, tiny: Path, tiny_edm: Path) -> None:
        module = SDXLModule(str(tiny_edm), vae=str(tiny / "vae"), loss=EDMLoss())
        with pytest.warns(UserWarning, match="normalises latents in another way"):
            module.setup("validate")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SDXLModule(str(tiny_edm), loss=EDMLoss()).setup("validate")

    def test_captions_that_vary_are_not_kept(self, tiny: Path, icons: Path) -> None:
        module = module_of(tiny, text_cache=MemoryCache())
        with pytest.warns(UserWarning, match=r"text_cache keeps no captions that data\.init_args\.shuffle_tags"):
            trainer_of(FreezeEmbeddings(0.5)).fit(module, data_of(icons, shuffle_tags=True))
        assert module.conditioner._learned is not None
        assert module.conditioner._learned.cache.kept == {}  # type: ignore[attr-defined]

    def test_captions_that_are_cut_off_warn(self, tiny: Path, icons: Path, tmp_path: Path) -> None:
        (tmp_path / "rocket.webp").write_bytes((icons / "01-rocket.webp").read_bytes())
        fits = "TOK " + "a" * 73  # with <s0><s1>, a token a letter: 75
        for prompt, warned in ((fits, []), (fits + "b", [f"1 captions are longer .* '{fits}b'"])):
            data = CaptionedImagesDataModule(tmp_path, resolution=16, instance_prompt=prompt)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                trainer_of(max_steps=1).fit(module_of(tiny), data)
            found = [str(warning.message) for warning in seen if "captions are longer" in str(warning.message)]
            assert len(found) == len(warned)
            assert all(re.match(pattern, message) for pattern, message in zip(warned, found, strict=True))

    def test_checks_come_before_weights(self, tiny: Path, icons: Path) -> None:
        module = SDXLModule(str(tiny), loss=EDMLoss())
        with pytest.raises(InputError, match="sigma_data"):
            trainer_of().fit(module, data_of(icons))
        assert not hasattr(module, "denoiser")


class TestWhatIsTrained:
    def test_nothing(self, tiny: Path) -> None:
        with pytest.raises(InputError, match=r"model\.init_args: nothing is trained; give an adapter"):
            SDXLModule(str(tiny), adapter=None).setup("fit")

    @pytest.mark.parametrize("setting", ["embeddings_lr", "embeddings_weight_decay", "text_encoders_lr"])
    def test_settings_of_what_is_not(self, tiny: Path, setting: str) -> None:
        with pytest.raises(InputError, match=rf"model\.init_args\.{setting} is 0\.0, but .* is not given"):
            SDXLModule(str(tiny), **{setting: 0.0}).setup("fit")

    def test_tokens_alone(self, tiny: Path, icons: Path) -> None:
        module, recorder = SDXLModule(str(tiny), tokens={"TOK": 2}, adapter=None), Recorder()
        trainer_of(recorder, max_steps=2).fit(module, data_of(icons))
        changed = {name for name, p in module.named_parameters() if not p.equal(recorder.start[name])}
        assert len(changed) == 2
        assert all(name.endswith("rows") for name in changed)

    def test_text_encoders_have_a_rate_and_decay_of_their_own(self, tiny: Path) -> None:
        settings = {"text_encoders_lr": 0.5, "text_encoders_weight_decay": 0.0, "embeddings_lr": 0.25}
        module = module_of(tiny, text_encoder_adapter=LoRA(rank=2), optimizer=adamw, **settings)
        module.configure_model()
        groups = {group["name"]: group for group in module.configure_optimizers().param_groups}  # type: ignore[union-attr]
        assert {name: group["lr"] for name, group in groups.items()} == {
            "unet": 1e-3,
            "text_encoders": 0.5,
            "embeddings": 0.25,
        }
        assert [groups[name]["weight_decay"] for name in ("unet", "text_encoders", "embeddings")] == [0.01, 0.0, 0.01]

    @pytest.mark.parametrize("clip_skip", [-1, 2])
    def test_clip_skip(self, tiny: Path, icons: Path, clip_skip: int) -> None:
        with pytest.raises(
            InputError, match=rf"clip_skip is {clip_skip}, but a text encoder has 2 layers; write 0 to 1"
        ):
            trainer_of().fit(module_of(tiny, clip_skip=clip_skip), data_of(icons))


def test_rates_are_logged_and_doubtful_ones_warned_of(tiny: Path, icons: Path) -> None:
    module = module_of(tiny, optimizer=lambda groups: Prodigy(groups, lr=1e-3, d0=1e-3))
    trainer = trainer_of(max_steps=2, log_every_n_steps=1)
    with pytest.warns(
        UserWarning, match=r"optimizer\.init_args\.lr is 0\.001, a factor on the rate that Prodigy finds"
    ):
        trainer.fit(module, data_of(icons))
    d = module.optimizers().param_groups[0]["d"]  # type: ignore[union-attr]
    assert trainer.logged_metrics["rate/unet"] == trainer.logged_metrics["rate/embeddings"]
    assert 0 < trainer.logged_metrics["rate/unet"] <= 1e-3 * d


def test_masked_places_have_no_part_in_the_loss(tiny: Path, batch: Batch) -> None:
    """Latents under a black mask may be what they like; under a white one nothing changes."""
    module = module_of(tiny)
    module.configure_model()
    latents = module.encode(batch)
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, :, 8:] = 1

    def loss_of(some: Batch) -> torch.Tensor:
        torch.manual_seed(0)

        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return latents + (torch.arange(8) < 4)  # wrong on the left alone

        return module.loss(denoise, latents, **module.target_and_mask(some, latents))

    everywhere, plain = loss_of({**batch, "mask": torch.ones(2, 1, 16, 16)}), loss_of(batch)
    assert everywhere.equal(plain)
    assert (plain > 0).all()
    assert loss_of({**batch, "mask": mask}).tolist() == [0, 0]


class TestTeacher:
    def test_is_the_untouched_base(self, tiny: Path, batch: Batch) -> None:
        """With text and UNet adapted, the target of taught rows is what a fresh base predicts for the same x, sigma."""
        module = module_of(tiny, text_encoder_adapter=LoRA(rank=2))
        module.configure_model()
        base = SDXLModule(str(tiny))
        base.configure_model()
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        some: Batch = {**batch, "caption": ["a photo of TOK", "an icon"], "teacher": [False, True]}
        x, y, sigma = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.5, 2.0])
        target = module.taught(some)(x, sigma, y)
        plain: Batch = {**batch, "caption": ["", "an icon"]}
        assert target[0].equal(y[0])
        torch.testing.assert_close(target[1], base.denoise(plain)(x, sigma)[1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(module.denoise(some)(x, sigma)[1], target[1], atol=1e-3)
        assert not target.requires_grad
        assert all(p.requires_grad for p in module.groups.parameters["unet"])

    def test_has_no_loss_where_nothing_is_learned_yet(self, tiny: Path, batch: Batch) -> None:
        module = module_of(tiny)
        module.configure_model()
        some: Batch = {**batch, "caption": ["an icon", "an icon"], "teacher": [True, True]}
        latents = module.encode(some)
        losses = module.loss(module.denoise(some), latents, **module.target_and_mask(some, latents))
        torch.testing.assert_close(losses, torch.zeros(2), rtol=0, atol=1e-9)

    def test_of_a_full_fine_tune_is_refused_at_once(self, tiny: Path, icons: Path) -> None:
        data = data_of(icons, prior=TeacherPrior("an icon"))
        module = SDXLModule(str(tiny), adapter=FullFinetune())
        with pytest.raises(InputError, match=r"prior is TeacherPrior, but FullFinetune keeps no copy of the base"):
            trainer_of().fit(module, data)
        assert not hasattr(module, "denoiser"), "before anything is loaded"


class TestClassImages:
    def test_are_rendered_by_the_base_and_kept(self, tiny: Path, icons: Path, tmp_path: Path) -> None:
        prior = ClassImages(root=str(tmp_path / "class"), prompt="an icon", num_images=3)
        data = CaptionedImagesDataModule(str(icons), resolution=32, batch_size=4, prior=prior)
        recorder = Recorder()
        seed_everything(1, verbose=False)
        trainer_of(recorder, max_steps=1).fit(module_of(tiny), data)
        files = sorted((tmp_path / "class").iterdir())
        assert [path.name for path in files] == [f"class_{number:05}.png" for number in range(3)]
        assert all(Image.open(path).size == (32, 32) for path in files)
        assert len({path.read_bytes() for path in files}) == 3
        times = [path.stat().st_mtime_ns for path in files]
        again = CaptionedImagesDataModule(str(icons), resolution=32, batch_size=4, prior=prior)
        trainer_of(max_steps=1).fit(module_of(tiny), again)
        assert [path.stat().st_mtime_ns for path in files] == times, "once and for all"

    def test_follow_from_their_seed_and_prompt(self, tiny: Path) -> None:
        module = module_of(tiny)
        module.configure_model()
        module.trainer = trainer_of()
        request: ClassImageRequest = {"prompt": "an icon", "size": (16, 24), "seed": 5}
        both = module.render_class_images([request, {**request, "seed": 6}])
        assert both.shape == (2, 3, 16, 24)
        noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(5))
        drawn = module.sample(blank_batch(["an icon"], (16, 24), CPU), noise, DPMSolverSampler(30), 5.0)
        torch.testing.assert_close(both[:1], drawn, rtol=0, atol=1e-4)
        assert not both[0].equal(both[1])
        assert module.denoiser.unet.training, "and training goes on"


def test_a_base_without_signal_at_the_last_timestep(tiny_v: Path, icons: Path, batch: Batch, tmp_path: Path) -> None:
    """Lin et al. (2023): at t = T - 1 the loss is that of v = -y, and a run is as any other."""
    base = tmp_path / "zero"
    shutil.copytree(tiny_v, base)
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    schedule = TimestepSchedule(zero_terminal_snr=True)
    loss = EDMLoss(UniformTimesteps(schedule), EDMWeighting(1.0))  # 1 / c_out^2: plain v-MSE
    module, recorder = module_of(base, loss=loss), Recorder()
    trainer_of(recorder).fit(module, data_of(icons))
    assert torch.isfinite(torch.tensor(recorder.losses)).all()

    latents = module.encode(batch)
    last = EDMLoss(UniformKarras(schedule.sigma_max * (1 - 1e-6), schedule.sigma_max), EDMWeighting(1.0))
    torch.manual_seed(0)
    ours = last(module.denoise(batch), latents)
    torch.manual_seed(0)
    torch.rand(2, dtype=torch.float64)  # that of sigma
    noise, a = torch.randn(latents.shape), 2.0**-24
    conditioning = module.conditioner(batch["caption"], module.time_ids(batch))
    added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
    x, t = a**0.5 * latents + (1 - a) ** 0.5 * noise, torch.tensor([999, 999])
    v = module.denoiser.unet(x, t, conditioning.context, added_cond_kwargs=added).sample
    expected = (v - (a**0.5 * noise - (1 - a) ** 0.5 * latents)).square().mean((1, 2, 3))
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=1e-4)  # y is a 4,096th of x, whose float32 has 24 bits

    with pytest.raises(
        InputError, match=r"noise\.init_args\.schedule is .*, but the base has .*zero_terminal_snr=True"
    ):
        module_of(base, loss=EDMLoss(UniformTimesteps(), EDMWeighting(1.0))).setup("fit")


def test_frozen_encoders_run_before_training_alone(tiny: Path, icons: Path) -> None:
    module, runs = SDXLModule(str(tiny), adapter=LoRA(rank=2), text_cache=MemoryCache()), []

    class Watch(Callback):
        def setup(self, trainer: Trainer, pl_module: SDXLModule, stage: str) -> None:
            pl_module.configure_model()
            pl_module.conditioner.encoders[0].register_forward_hook(lambda *_: runs.append("encoder"))

        def on_train_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
            runs.append("training")

    trainer_of(Watch()).fit(module, data_of(icons))
    assert runs == ["encoder", "encoder", "training"], "22 captions, 16 at once"


class Places(Callback):
    """Watches where frozen weights are, on a machine where there is one place alone, by what has been asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.away: set[int] = set()
        self.moved: set[str] = set()
        self.seen: list[tuple[str, list[str]]] = []
        monkeypatch.setattr("lit_edm.sdxl.placement.place_frozen", self.place)
        monkeypatch.setattr("lit_edm.sdxl.latents.place_frozen", self.place)
        monkeypatch.setattr("lit_edm.sdxl.conditioning.place_frozen", self.place)

    def place(self, network: torch.nn.Module, device: Any) -> None:
        parameters = {id(p) for p in network.parameters() if not p.requires_grad}
        self.moved |= {name for name, own in self.frozen.items() if own & parameters}
        self.away = self.away | parameters if device == "cpu" else self.away - parameters  # the device is device("cpu")

    def setup(self, trainer: Trainer, pl_module: SDXLModule, stage: str) -> None:
        pl_module.configure_model()
        networks = {"unet": pl_module.denoiser, "text": pl_module.conditioner, "vae": pl_module.latents}
        self.frozen = {n: {id(p) for p in m.parameters() if not p.requires_grad} for n, m in networks.items()}
        parts = {"vae.encoder": pl_module.latents.vae.encoder, "vae.decoder": pl_module.latents.vae.decoder}
        for name, part in (parts | {"unet": pl_module.denoiser.unet}).items():
            part.register_forward_pre_hook(lambda *_, name=name: self.look(name))

    def look(self, name: str) -> None:
        self.seen.append((name, [part for part, own in self.frozen.items() if not own & self.away]))

    def on_train_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        self.look("training")


def test_caches_are_filled_with_the_vae_alone_on_the_device(
    tiny: Path, icons: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data_of(icons, latent_cache=MemoryCache())
    for run in range(2):
        module, places = module_of(tiny, optimizer=adamw), Places(monkeypatch)
        trainer_of(places, max_steps=1).fit(module, images)
        encoded = [there for name, there in places.seen if name == "vae.encoder"]
        assert encoded == ([] if run else [["vae"]] * 22)
        assert ("training", ["unet", "text"]) in places.seen
        assert places.moved == ({"vae"} if run else {"vae", "unet", "text"}), "nothing leaves if there is nothing to do"


def test_class_images_are_rendered_without_the_encoders(
    tiny: Path, icons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior, places = ClassImages(str(tmp_path), "an icon", num_images=1), Places(monkeypatch)
    trainer_of(places, max_steps=1).fit(module_of(tiny, optimizer=adamw), data_of(icons, prior=prior))
    assert places.seen[:30] == [("unet", ["unet", "vae"])] * 30
    assert places.seen[30:32] == [("vae.decoder", ["unet", "vae"]), ("training", ["unet", "text", "vae"])]


def test_encoders_are_back_when_a_phase_starts_late(tiny: Path, icons: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights that are there no gradient is right: here they are not numbers while they are away."""
    kept: dict[int, torch.Tensor] = {}

    def place(encoders: torch.nn.Module, device: Any) -> None:
        for parameter in encoders.parameters():
            if parameter.requires_grad:
                continue
            if device == "cpu":  # as `keep` sends them away; on this machine the device is torch.device("cpu")
                kept.setdefault(id(parameter), parameter.data)
                parameter.data = torch.full_like(parameter.data, float("nan"))
            else:
                parameter.data = kept.pop(id(parameter), parameter.data)

    monkeypatch.setattr("lit_edm.sdxl.conditioning.place_frozen", place)
    module, recorder = module_of(tiny, optimizer=adamw, text_cache=MemoryCache()), Recorder()
    trainer_of(TrainDuring("embeddings", start=0.5), recorder).fit(module, data_of(icons))
    assert [not a.equal(b) for a, b in pairwise(recorder.embeddings)] == [False, False, True, True]
    assert torch.isfinite(recorder.embeddings[-1]).all()
    assert torch.isfinite(torch.tensor(recorder.losses)).all()


def test_dropped_captions_are_what_guidance_contrasts_with(tiny: Path, batch: Batch) -> None:
    module = module_of(tiny)
    module.configure_model()
    some: Batch = {**batch, "caption": ["a TOK", ""]}
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 2.0])
    dropped, contrast = module.denoise(some)(x, sigma), module.denoise_unconditionally(some)(x, sigma)
    torch.testing.assert_close(dropped[1], contrast[1])
    assert not torch.allclose(dropped[0], contrast[0], atol=1e-3)
    module.eval()
    assert not torch.allclose(module.denoise(some)(x, sigma)[1], contrast[1], atol=1e-3), "an empty prompt is a prompt"


class TestSecondFit:
    """As in a notebook: the same module, another trainer."""

    def test_wakes_what_rested(self, tiny: Path, icons: Path) -> None:
        module, recorder = module_of(tiny, optimizer=adamw, text_cache=MemoryCache()), Recorder()
        trainer_of(FreezeEmbeddings(0.5)).fit(module, data_of(icons))
        trainer_of(recorder).fit(module, data_of(icons))
        assert [not a.equal(b) for a, b in pairwise(recorder.embeddings)] == [True] * 4

    def test_renders_class_images_by_the_base_all_the_same(self, tiny: Path, icons: Path) -> None:
        request: ClassImageRequest = {"prompt": "an icon", "size": (16, 16), "seed": 5}
        module = module_of(tiny, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.05))
        module.configure_model()
        module.trainer = trainer_of()
        before = module.render_class_images([request])
        trainer_of().fit(module, data_of(icons))
        torch.testing.assert_close(module.render_class_images([request]), before, rtol=0, atol=1e-5)
        trained = module.sample(
            blank_batch(["an icon"], (16, 16), CPU), unit_noise([5], (4, 8, 8), CPU), DPMSolverSampler(30), 5.0
        )
        assert not torch.allclose(trained, before, atol=1e-2)


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_resumed_run_has_the_configs_rates_and_decay(
    tiny: Path, icons: Path, tmp_path: Path, scheduled: bool
) -> None:
    schedule = (lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.5, 4)) if scheduled else None
    trainer = trainer_of(max_steps=2)
    trainer.fit(module_of(tiny, optimizer=adamw, lr_scheduler=schedule), data_of(icons))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = module_of(
        tiny,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-5, weight_decay=0.5, betas=(0.5, 0.6)),
        lr_scheduler=schedule,
        embeddings_lr=3e-6,
    )
    trainer_of(max_steps=3).fit(again, data_of(icons), ckpt_path=tmp_path / "x.ckpt")
    groups = again.optimizers().param_groups  # type: ignore[union-attr]
    assert [(group["weight_decay"], group["betas"]) for group in groups] == [(0.5, (0.5, 0.6))] * 2
    rates = [1e-3 * 0.625] * 2 if scheduled else [1e-5, 3e-6]
    assert [group["lr"] for group in groups] == pytest.approx(rates), "a schedule goes on where it was"


@pytest.mark.parametrize(
    ("base", "loss"),
    [
        ("tiny", EDMLoss(UniformTimesteps(), SNRWeighting())),
        ("tiny_v", EDMLoss(UniformTimesteps(), EDMWeighting(1.0))),
        ("tiny_edm", EDMLoss(LogNormal(), EDMWeighting(0.5))),
    ],
)
def test_without_a_loss_a_base_is_trained_as_it_was(base: str, loss: EDMLoss, request: pytest.FixtureRequest) -> None:
    module = module_of(request.getfixturevalue(base))
    module.setup("validate")
    assert module.loss == loss
    again = module_of(request.getfixturevalue(base))
    again.configure_model()
    assert again.loss == loss
    own = module_of(request.getfixturevalue(base))
    own.loss = EDMLoss(LogNormal())
    own.configure_model()
    assert own.loss == EDMLoss(LogNormal()), "one that is put there by hand stays"


class TestEmbeddingsOfAFile:
    def test_are_where_tokens_start(self, tiny: Path, tmp_path: Path) -> None:
        rows = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}
        save_file(rows, tmp_path / "x_emb.safetensors")
        module = module_of(tiny, embeddings=str(tmp_path / "x_emb.safetensors"))
        module.configure_model()
        started = module.conditioner.new_embeddings()
        assert all(started[name].equal(values) for name, values in rows.items())
        assert all(parameter.requires_grad for parameter in started.values())

    @pytest.mark.parametrize(
        ("rows", "said"),
        [
            ({"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 48)}, r"clip_l is \(1, 32\), .* want \(2, 32\)"),
            ({"clip_l": torch.zeros(2, 32), "clip_g": torch.zeros(2, 40)}, r"clip_g is \(2, 40\), .* want \(2, 48\)"),
        ],
    )
    def test_that_do_not_fit(self, tiny: Path, tmp_path: Path, rows: dict[str, torch.Tensor], said: str) -> None:
        save_file(rows, tmp_path / "x_emb.safetensors")
        module = module_of(tiny, embeddings=str(tmp_path / "x_emb.safetensors"))
        with pytest.raises(InputError, match=said):
            module.configure_model()

    def test_beside_other_starts(self, tiny: Path) -> None:
        for settings in ({"initializers": {"TOK": "icon"}, "tokens": {"TOK": 2}}, {"tokens": None}):
            with pytest.raises(InputError, match=r"model\.init_args\.embeddings: x is where all tokens start"):
                SDXLModule(str(tiny), embeddings="x", **settings)
