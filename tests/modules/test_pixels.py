from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_edm.batch import LabelledBatch
from lit_edm.cli import main
from lit_edm.edm import (
    EDMLoss,
    EDMPreconditioning,
    EDMWeighting,
    LearnedWeighting,
    LogNormal,
    LogUniform,
    ScaledLogNormal,
    karras_sigmas,
    sample_heun,
)
from lit_edm.errors import InputError
from lit_edm.modules import EDMModule, SmallUNet

Make = Callable[..., Any]


class Recorder(nn.Module):
    """A network that keeps what it is called with and answers with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.seen.append((x, c_noise, class_labels))
        return torch.zeros_like(x) * self.weight


class Losses(Callback):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


@pytest.fixture
def labelled() -> LabelledBatch:
    return LabelledBatch(image=torch.rand(3, 1, 4, 4) * 2 - 1, label=torch.tensor([2, 0, 1]))


def weights(module: EDMModule) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def test_network_is_called_as_equation_7_says(labelled: LabelledBatch) -> None:
    module = EDMModule(Recorder(), (1, 4, 4), num_classes=3)
    x, sigma = torch.randn(3, 1, 4, 4), torch.tensor([0.1, 1.0, 10.0])
    module.denoise(labelled)(x, sigma)
    (scaled, c_noise, label) = module.network.seen[0]  # type: ignore[index]
    torch.testing.assert_close(scaled, x / (sigma**2 + 0.25).sqrt().view(3, 1, 1, 1))
    torch.testing.assert_close(c_noise, sigma.log() / 4)
    assert label.tolist() == [2, 0, 1]


def test_training_step_is_the_papers_loss(pixels: Make, labelled: LabelledBatch) -> None:
    module = pixels(loss=EDMLoss(LogNormal(-0.5, 1.0)))
    torch.manual_seed(3)
    loss = module.training_step(labelled, 0)
    torch.manual_seed(3)
    torch.rand(3)  # which labels are dropped
    sigma = (-0.5 + torch.special.ndtri(torch.rand(3, dtype=torch.float64))).exp().float().view(3, 1, 1, 1)
    y, n = labelled["image"], torch.randn(3, 1, 4, 4) * sigma
    root = (sigma**2 + 0.25).sqrt()
    f = module.network((y + n) / root, sigma.flatten().log() / 4, labelled["label"])
    d = 0.25 / root**2 * (y + n) + 0.5 * sigma / root * f
    expected = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * (d - y) ** 2).mean()
    torch.testing.assert_close(loss, expected)


def test_pixels_are_their_own_latents(pixels: Make, labelled: LabelledBatch) -> None:
    assert pixels().encode(labelled) is labelled["image"]
    assert pixels().decode(labelled["image"]) is labelled["image"]


@pytest.mark.parametrize("classes", [None, 3])
def test_networks_of_diffusers_fit(labelled: LabelledBatch, classes: int | None) -> None:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    network = UNet2DModel(
        4, 1, 1, num_class_embeds=classes and classes + 1, norm_num_groups=4, **blocks, layers_per_block=1
    )
    module = EDMModule(network, (1, 4, 4), num_classes=classes)
    module.training_step(labelled, 0).backward()
    assert network.conv_in.weight.grad.any()
    assert module.sample(torch.randn(3, 1, 4, 4), labelled["label"], num_steps=2).shape == (3, 1, 4, 4)


class TestLabels:
    @pytest.mark.parametrize(("dropout", "least", "most"), [(0.0, 0, 0), (0.3, 200, 400), (1.0, 1000, 1000)])
    def test_are_dropped_in_training_alone(self, dropout: float, least: int, most: int) -> None:
        module = EDMModule(Recorder(), (1, 1, 1), num_classes=3, label_dropout=dropout)
        batch = LabelledBatch(image=torch.zeros(1000, 1, 1, 1), label=torch.ones(1000).long())
        for training in (True, False):
            module.train(training).denoise(batch)(batch["image"], torch.ones(1000))
        in_training, in_evaluation = (label for _, _, label in module.network.seen)  # type: ignore[misc]
        assert set(in_training.unique().tolist()) <= {1, 3}
        assert least <= int((in_training == 3).sum()) <= most
        assert in_evaluation.unique().tolist() == [1]
        assert batch["label"].unique().tolist() == [1], "the batch itself is left alone"

    def test_are_not_told_to_an_unconditional_network(self, labelled: LabelledBatch) -> None:
        module = EDMModule(Recorder(), (1, 4, 4))
        module.denoise(labelled)(labelled["image"], torch.ones(3))
        assert module.network.seen[0][2] is None  # type: ignore[index]

    def test_stand_for_any_class_without_condition(self, labelled: LabelledBatch) -> None:
        module = EDMModule(Recorder(), (1, 4, 4), num_classes=3, label_dropout=0.1)
        module.denoise_unconditionally(labelled)(labelled["image"], torch.ones(3))
        assert module.network.seen[0][2].tolist() == [3, 3, 3]  # type: ignore[index]

    @pytest.mark.parametrize("settings", [{"num_classes": None, "label_dropout": 0.1}, {"label_dropout": 0.0}])
    def test_must_have_been_dropped_for_guidance(self, pixels: Make, labelled: LabelledBatch, settings: Any) -> None:
        module = pixels(**settings)
        module.sample(labelled["image"], labelled["label"], num_steps=1)
        with pytest.raises(InputError, match=r"guidance needs model\.init_args\.num_classes"):
            module.sample(labelled["image"], labelled["label"], num_steps=1, guidance_scale=2.0)

    @pytest.mark.parametrize("share", [-0.1, 1.1])
    def test_share_outside_its_range(self, pixels: Make, share: float) -> None:
        with pytest.raises(InputError, match=r"label_dropout is .*in \[0, 1\]"):
            pixels(label_dropout=share)


class TestSamples:
    def test_of_gaussian_data_have_the_known_spread(self) -> None:
        """F = 0 is the best network for N(0, sigma_data^2); 18 steps of Heun's method then end at 0.527624637001."""
        noise = torch.randn(5, 1, 4, 4, dtype=torch.float64)
        samples = EDMModule(Recorder().double(), (1, 4, 4)).sample(noise, torch.zeros(5).long())
        torch.testing.assert_close(samples, 0.527624637001 * noise, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("scale", [1.0, 3.0])
    def test_are_those_of_algorithm_1(self, pixels: Make, labelled: LabelledBatch, scale: float) -> None:
        module = pixels(label_dropout=0.5, sigma_min=0.01, sigma_max=20.0)
        noise, sigmas = torch.randn(3, 1, 4, 4), karras_sigmas(5, 0.01, 20.0)

        def denoise(label: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
            return lambda x, sigma: EDMPreconditioning().denoise(lambda x, c: module.network(x, c, label), x, sigma)

        conditional, free = denoise(labelled["label"]), denoise(torch.tensor([3, 3, 3]))
        expected = sample_heun(
            lambda x, s: free(x, s) + scale * (conditional(x, s) - free(x, s)), noise * sigmas[0], sigmas
        )
        samples = module.sample(noise, labelled["label"], 5, scale)
        torch.testing.assert_close(samples, expected, rtol=1e-4, atol=1e-5)
        assert module.training, "back in its own mode"
        assert not samples.requires_grad


class TestTraining:
    def test_learns(self, patches: Make, trainer: Make) -> None:
        seed_everything(0, verbose=False)
        losses, module = Losses(), EDMModule(SmallUNet(1, 3, channels=8), (1, 4, 4), num_classes=3)
        module.optimizer = lambda params: torch.optim.Adam(params, lr=3e-3)
        trainer(losses, max_steps=150).fit(module, patches(batch_size=7))
        assert sum(losses.values[:10]) / 10 > 1
        assert sum(losses.values[-10:]) / 10 < 0.8

    def test_needs_no_validation_set(self, pixels: Make, patches: Make, trainer: Make) -> None:
        for data in (patches(held_out=0.0), DataLoader(patches().read()[0], 3)):
            losses = Losses()
            trainer(losses).fit(pixels(), data)
            assert len(losses.values) == 4

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_trained_values_and_their_state_are_float32(
        self, pixels: Make, patches: Make, trainer: Make, precision: str
    ) -> None:
        module = pixels()
        trainer(precision=precision).fit(module, patches())
        states = [value for state in module.optimizers().state.values() for value in state.values()]
        assert {value.dtype for value in [*module.parameters(), *states]} == {torch.float32}

    def test_half_precision_hardly_changes_the_loss(self, pixels: Make, labelled: LabelledBatch) -> None:
        """Also at a sigma of 0.002, where lambda is 250,004: what surrounds the network stays float32."""
        for sigma in (0.002, 0.5, 80.0):
            module, losses = pixels(loss=EDMLoss(LogUniform(sigma, sigma * 1.0001))), []
            for enabled in (False, True):
                torch.manual_seed(0)
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    losses.append(module.training_step(labelled, 0))
            torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0)

    def test_parts_of_the_loss_are_trained_without_decay(self, pixels: Make, patches: Make, trainer: Make) -> None:
        loss = EDMLoss(LogNormal(), LearnedWeighting(EDMWeighting(0.5)))
        module = pixels(loss=loss, optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1))
        trainer().fit(module, patches())
        groups = module.optimizers().param_groups
        assert [(group["name"], group["weight_decay"]) for group in groups] == [("network", 0.1), ("loss", 0.0)]
        assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in module.parameters()}
        assert loss.weighting.weight.abs().max() > 0.1  # type: ignore[attr-defined]

    def test_schedule_steps_with_the_optimizer(self, pixels: Make, patches: Make, trainer: Make) -> None:
        module = pixels(lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, 4))
        trainer(max_steps=2, accumulate_grad_batches=2).fit(module, patches())
        assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0.5e-4)


class TestCheckpoint:
    def test_resumes_bit_by_bit_with_weights_only_loading(
        self, pixels: Make, patches: Make, trainer: Make, tmp_path: Path
    ) -> None:
        def fit(steps: int, **settings: Any) -> tuple[Trainer, EDMModule]:
            seed_everything(5, verbose=False)
            fitted, module = trainer(max_steps=steps), pixels(loss=EDMLoss(weighting=LearnedWeighting()))
            fitted.fit(
                module, DataLoader(patches().read()[0][:3], 3), **settings
            )  # one batch, the position of no matter
            return fitted, module

        fit(4)[0].save_checkpoint(tmp_path / "epoch.ckpt")
        _, resumed = fit(8, ckpt_path=tmp_path / "epoch.ckpt", weights_only=True)
        _, whole = fit(8)
        assert weights(resumed).equal(weights(whole))
        assert not weights(whole).equal(weights(fit(4)[1]))

    def test_with_another_preconditioning_is_refused(
        self, pixels: Make, patches: Make, trainer: Make, tmp_path: Path
    ) -> None:
        fitted = trainer(max_steps=1)
        fitted.fit(pixels(), patches())
        fitted.save_checkpoint(tmp_path / "x.ckpt")
        same = EDMModule.load_from_checkpoint(
            tmp_path / "x.ckpt", network=pixels().network, image_shape=(1, 4, 4), num_classes=3
        )
        assert weights(same).equal(weights(fitted.lightning_module))
        with pytest.raises(InputError, match=r"trained with preconditioning EDMPreconditioning\(sigma_data=0\.5\)"):
            EDMModule.load_from_checkpoint(
                tmp_path / "x.ckpt",
                network=pixels().network,
                image_shape=(1, 4, 4),
                preconditioning=EDMPreconditioning(1.0),
            )

    def test_of_the_command_line_rebuilds_every_part(self, tmp_path: Path) -> None:
        network = {"class_path": "SmallUNet", "init_args": {"in_channels": 1, "num_classes": 10, "channels": 8}}
        config = {
            "model": {
                "class_path": "EDMModule",
                "init_args": {
                    "network": network,
                    "image_shape": [1, 8, 8],
                    "num_classes": 10,
                    "preconditioning": {"class_path": "EDMPreconditioning", "init_args": {"sigma_data": 0.85}},
                    "loss": {
                        "class_path": "EDMLoss",
                        "init_args": {"weighting": {"class_path": "EDMWeighting", "init_args": {"sigma_data": 0.85}}},
                    },
                },
            },
            "data": {"class_path": "DigitsDataModule"},
            "trainer": {
                "max_steps": 1,
                "accelerator": "cpu",
                "logger": False,
                "limit_val_batches": 0,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": str(tmp_path),
            },
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        main(["fit", "--config", str(tmp_path / "config.yaml")])
        (path,) = tmp_path.rglob("*.ckpt")
        module = EDMModule.load_from_checkpoint(path)
        assert module.preconditioning == EDMPreconditioning(0.85)
        assert module.loss.weighting == EDMWeighting(0.85)  # type: ignore[attr-defined]
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(saved[name].equal(value) for name, value in module.state_dict().items())


class TestSetup:
    def test_half_precision_weights(self, pixels: Make, patches: Make, trainer: Make) -> None:
        with pytest.raises(InputError, match=r"trainer\.precision is bf16-true; use one of 32-true, bf16-mixed"):
            trainer(precision="bf16-true").fit(pixels(), patches())

    @pytest.mark.parametrize(
        ("loss", "part"),
        [
            (EDMLoss(weighting=EDMWeighting(1.0)), "weighting"),
            (EDMLoss(weighting=LearnedWeighting(EDMWeighting(1.0))), "weighting"),
            (EDMLoss(noise=ScaledLogNormal(1.0)), "noise"),
        ],
    )
    def test_two_values_of_sigma_data(self, pixels: Make, loss: EDMLoss, part: str) -> None:
        with pytest.raises(InputError, match=rf"loss\.init_args\.{part}\.init_args\.sigma_data is 1\.0, but .* 0\.5"):
            pixels(loss=loss).setup("fit")

    def test_images_of_another_shape(self, pixels: Make, patches: Make, trainer: Make) -> None:
        with pytest.raises(InputError, match=r"image_shape is \[1, 8, 8\], but the images are \[1, 4, 4\]"):
            trainer().fit(pixels(image_shape=(1, 8, 8)), patches())

    def test_images_of_other_classes(self, pixels: Make, patches: Make, trainer: Make) -> None:
        with pytest.raises(InputError, match=r"num_classes is 2, but the images are of 3 classes"):
            trainer().fit(pixels(num_classes=2), patches())
