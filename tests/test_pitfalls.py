"""What other trainers get wrong, a test a line; each is named after what goes wrong there."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lit_edm.batch import Batch
from lit_edm.cache import MemoryCache
from lit_edm.callbacks import FreezeEmbeddings, RetractEmbeddings, SaveAdapter, ValidationImages
from lit_edm.data import CaptionedImagesDataModule, ClassImages, TeacherPrior
from lit_edm.edm import (
    EDMLoss,
    EDMPreconditioning,
    EDMWeighting,
    HeunSampler,
    LogNormal,
    MinSNRWeighting,
    SNRWeighting,
    SoftMinSNRWeighting,
    UniformKarras,
    UniformTimesteps,
    UnitWeighting,
    VelocityPreconditioning,
)
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.optim import GroupedProdigy
from lit_edm.sdxl import DoRA, FullFinetune, LatentSpace, LoRA, Placeholders, SDXLCheckpoint, SDXLDenoiser

ROOT = Path(__file__).parents[1]
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255), "black": (0, 0, 0)}


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Pictures of one colour each, whose captions name it; sizes differ."""
    return pictures(tmp_path / "colours", COLOURS)


def pictures(root: Path, colours: dict[str, tuple[int, int, int]], size: tuple[int, int] = (24, 16)) -> Path:
    root.mkdir(parents=True)
    for index, (name, colour) in enumerate(colours.items()):
        Image.new("RGB", (size[0] + 4 * index, size[1]), colour).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"{name} TOK")
    return root


def data_of(root: Path, **settings: Any) -> CaptionedImagesDataModule:
    return CaptionedImagesDataModule(str(root), **({"resolution": 16, "batch_size": 2} | settings))


def module_of(base: Path, **settings: Any) -> SDXLModule:
    torch.manual_seed(0)
    return SDXLModule(str(base), **({"tokens": {"TOK": 2}, "adapter": LoRA(rank=2), "optimizer": adamw} | settings))


def ready(base: Path, **settings: Any) -> SDXLModule:
    """A module with its networks, updates no longer zero, without a trainer."""
    module = module_of(base, **settings)
    module.configure_model()
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return module


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


def trainer_of(*callbacks: Callback, **settings: Any) -> Trainer:
    settings = {"max_steps": 4, "logger": False, "enable_checkpointing": False} | settings
    return Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **settings
    )


class Recorder(Callback):
    """Keeps the losses, the captions, and the tokens after each batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.captions: list[list[str]] = []
        self.tokens: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        self.tokens = [self.read(pl_module)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: SDXLModule, outputs: Any, batch: Batch, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.captions.append(list(batch["caption"]))
        self.tokens.append(self.read(pl_module))

    def read(self, module: SDXLModule) -> Tensor:
        return torch.cat([torch.zeros(0), *(p.detach().flatten().clone() for p in module.embedding_parameters())])


def colour_of(pixels: Tensor) -> str:
    """Names the colour of pixels (3, ...)."""
    mean = pixels.flatten(1).mean(1)
    return min(COLOURS, key=lambda name: float((mean - (torch.tensor(COLOURS[name]) / 127.5 - 1)).abs().sum()))


def as_moments(image: Tensor) -> Tensor:
    """A stand-in for the VAE's encoder that keeps the colour."""
    return functional.interpolate(image, scale_factor=0.5, mode="area")


@pytest.mark.parametrize("tokens", [None, {"TOK": 2}])
def test_01_prompts_without_begin_and_end_marks(tiny: Path, batch: Batch, tokens: dict[str, int] | None) -> None:
    module = ready(tiny, tokens=tokens)
    seen = module.denoise(batch).keywords["conditioning"]  # type: ignore[attr-defined]
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny)
    for (_, rows), part in zip(module.conditioner.new_embeddings().items(), ("", "_2"), strict=False):
        parts = {"text_encoder": getattr(pipe, f"text_encoder{part}"), "tokenizer": getattr(pipe, f"tokenizer{part}")}
        pipe.load_textual_inversion(rows.detach(), token=module.placeholders.names, **parts)
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    texts = [module.placeholders.replace(caption) for caption in batch["caption"]]
    context, _, pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
    torch.testing.assert_close(seen.context, context, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.pooled, pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_02_cached_latents_of_another_image(colours: Path, tmp_path: Path, num_workers: int) -> None:
    """Under DDP, too: tests/data has that."""
    classes = pictures(tmp_path / "classes", {"yellow": (255, 255, 0)} | COLOURS)
    data = data_of(
        colours,
        prior=ClassImages(root=str(classes), prompt="none"),
        latent_cache=MemoryCache(),
        random_flip=True,
        repeats=2,
        num_workers=num_workers,
    )
    data.setup("fit")
    assert data.fill_cache(as_moments, "colours")
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for batch in loader:
            assert "image" not in batch
            for moments, caption in zip(batch["moments"], batch["caption"], strict=True):
                named = caption.removesuffix(" TOK")
                assert named == "yellow" or colour_of(moments) == named


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_03_prompts_and_images_of_priors_in_another_order(colours: Path, tmp_path: Path, batch_size: int) -> None:
    classes = pictures(tmp_path / "classes", COLOURS)
    data = data_of(colours, prior=ClassImages(root=str(classes), prompt="none"), batch_size=batch_size)
    data.setup("fit")
    seen = [
        (colour_of(image), caption, weight)
        for batch in data.train_dataloader()
        for image, caption, weight in zip(batch["image"], batch["caption"], batch["weight"].tolist(), strict=True)
    ]
    assert len(seen) == 2 * len(COLOURS)
    assert all(caption == f"{colour} TOK" for colour, caption, _ in seen)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_04_one_weight_for_instance_and_prior(tiny: Path, batch: Batch, rows: int) -> None:
    module = ready(tiny)
    weight = torch.tensor([1.0, 0.25, 3.0])[:rows]
    some: Any = {
        "image": batch["image"][[0, 1, 0]][:rows],
        "caption": [*batch["caption"], "x"][:rows],
        "original_size": batch["original_size"][[0, 1, 0]][:rows],
        "crop_top_left": batch["crop_top_left"][[0, 1, 0]][:rows],
    }
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    torch.manual_seed(0)
    weighted = module.training_step({**some, "weight": weight}, 0)
    torch.manual_seed(0)
    latents = module.encode(some)
    expected = (module.loss(module.denoise(some), latents) * weight).sum() / rows
    torch.testing.assert_close(weighted, expected)


def test_05_min_snr_of_v_with_one_added() -> None:
    """Of v-MSE it is min(r, gamma) / (r + 1)."""
    sigma = torch.logspace(-1.5, 1.1, 9)
    r = 1 / sigma**2
    c_out = VelocityPreconditioning()(sigma).c_out
    weight_of_v = MinSNRWeighting(5.0, 1.0)(sigma) * c_out**2
    torch.testing.assert_close(weight_of_v, r.clamp(max=5.0) / (r + 1))


def test_06_playground_trained_at_high_noise_alone() -> None:
    """The share of the loss above sigma = 2 of a network that knows nothing yet: lambda E|D - y|^2 = lambda c_out^2."""
    args = yaml.safe_load((ROOT / "configs/playground.yaml").read_text())["model"]["init_args"]["loss"]["init_args"]
    ours = LogNormal(**args["noise"]["init_args"]), EDMWeighting(**args["weighting"]["init_args"])
    shares = []
    for noise, weighting in (ours, (UniformKarras(), UnitWeighting())):
        torch.manual_seed(0)
        sigma = noise(100_000, torch.device("cpu"))
        loss = weighting(sigma) * EDMPreconditioning()(sigma).c_out ** 2
        shares.append(float(loss[sigma > 2].sum() / loss.sum()))
    assert shares[0] < 0.08
    assert shares[1] > 0.3, "what others do"


@pytest.mark.parametrize("adapter", [LoRA(rank=2), DoRA(rank=2), FullFinetune()])
def test_07_trained_values_in_half_precision(tiny: Path, colours: Path, adapter: Any) -> None:
    text = LoRA(rank=2)
    module = module_of(tiny, adapter=adapter, text_encoder_adapter=text, optimizer=GroupedProdigy)
    trainer_of(precision="bf16-mixed", max_steps=2).fit(module, data_of(colours))
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    states = [value for state in module.optimizers().state.values() for value in state.values()]  # type: ignore[union-attr]
    assert {value.dtype for value in states if isinstance(value, Tensor) and value.is_floating_point()} == {
        torch.float32
    }


def test_08_sizes_in_half_precision(tiny: Path) -> None:
    """1023 and 3001 are no bf16 numbers: what the UNet's embedding of sizes gets must be float32."""
    unet = SDXLCheckpoint(str(tiny)).load_unet(torch.bfloat16)
    module = ready(tiny)
    denoiser, seen = SDXLDenoiser(unet, module.denoiser.preconditioning), []
    unet.add_time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sizes = torch.tensor([[1023, 3001, 1, 3, 1024, 1023]])
    denoiser(torch.randn(1, 4, 8, 8), torch.ones(1), module.conditioner(["x"], sizes))
    assert seen[0].dtype == torch.float32
    assert seen[0].tolist() == sizes.flatten().tolist()


def test_09_denoiser_and_weights_in_half_precision(tiny_edm: Path, batch: Batch) -> None:
    module = ready(tiny_edm, loss=EDMLoss(LogNormal(math.log(0.002), 1e-4), EDMWeighting(0.5)))
    losses = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.manual_seed(0)
            losses.append(module.loss(module.denoise(batch), module.encode(batch)).mean())
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_10_resumed_without_tokens_unpivoted_and_with_the_data_over_again(
    tiny: Path, colours: Path, tmp_path: Path, stop: int
) -> None:
    """Six steps in two epochs, the pivot in the middle of the first; stopped after some, and resumed."""

    def run(max_steps: int, name: str, **resume: Any) -> Recorder:
        seed_everything(1, verbose=False)
        recorder = Recorder()
        keep = ModelCheckpoint(tmp_path / name, save_last=True, every_n_train_steps=1)
        phases = FreezeEmbeddings(2 / max_steps if max_steps == 6 else min(1, 2 / max_steps))
        trainer = trainer_of(phases, recorder, keep, max_steps=max_steps, enable_checkpointing=True)
        trainer.fit(module_of(tiny, optimizer=GroupedProdigy), data_of(colours, random_flip=True), **resume)
        return recorder

    whole, first = run(6, "whole"), run(stop, "first")
    rest = run(6, "rest", ckpt_path=tmp_path / "first" / "last.ckpt")
    assert rest.tokens[0].equal(whole.tokens[stop])
    assert [*first.captions, *rest.captions] == whole.captions
    assert [*first.losses, *rest.losses] == whole.losses
    assert [a.equal(b) for a, b in pairwise(rest.tokens)] == [step >= 2 for step in range(stop, 6)]


def test_11_half_of_one_epoch_is_no_epoch(tiny: Path, colours: Path) -> None:
    recorder = Recorder()
    data = data_of(colours, batch_size=1, repeats=2)
    trainer_of(FreezeEmbeddings(0.5), recorder, max_epochs=1, max_steps=-1, accumulate_grad_batches=2).fit(
        module_of(tiny), data
    )
    moved = [not a.equal(b) for a, b in pairwise(recorder.tokens)]
    assert moved == [index in (1, 3, 5) for index in range(10)], "of 5 steps of 2 batches, those before step 2.5"


@pytest.mark.parametrize("optimizer", [adamw, GroupedProdigy])
def test_12_tokens_renormalised_after_the_pivot(tiny: Path, colours: Path, optimizer: Any) -> None:
    recorder = Recorder()
    trainer_of(FreezeEmbeddings(0.5), RetractEmbeddings(), recorder, accumulate_grad_batches=2).fit(
        module_of(tiny, optimizer=optimizer), data_of(colours, batch_size=5, repeats=8)
    )
    moved = [not a.equal(b) for a, b in pairwise(recorder.tokens)]
    assert [index for index, m in enumerate(moved) if m] == [1, 3], "two of four steps, of two batches each"


def test_13_the_whole_embedding_table_in_the_optimizer(tiny: Path) -> None:
    module = ready(tiny, text_encoder_adapter=FullFinetune())
    groups = {group["name"]: group["params"] for group in module.configure_optimizers().param_groups}  # type: ignore[union-attr]
    assert sorted(p.shape[0] for p in groups["embeddings"]) == [2, 2]
    tables = {id(encoder.get_input_embeddings().table.weight) for encoder in module.conditioner.encoders}  # type: ignore[operator]
    assert not tables & {id(p) for params in groups.values() for p in params}


def test_14_text_encoders_at_work_after_the_pivot(tiny: Path, colours: Path) -> None:
    """They run once more for the captions to keep; and the clipped norm is the UNet's alone."""
    module = module_of(tiny, text_cache=MemoryCache())
    runs: list[int] = []
    norms: list[tuple[float, float]] = []

    class Watch(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
            pl_module.conditioner.encoders[0].register_forward_hook(lambda *_: runs.append(trainer.global_step))
            clip = pl_module.configure_gradient_clipping

            def watched(optimizer: Any, *args: Any, **settings: Any) -> None:
                grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                unet = [p.grad for p in pl_module.parameter_groups()["unet"]]
                norms.append(tuple(float(torch.nn.utils.get_total_norm(g)) for g in (grads, unet)))  # type: ignore[arg-type]
                clip(optimizer, *args, **settings)

            pl_module.configure_gradient_clipping = watched  # type: ignore[method-assign]

    data = data_of(colours, batch_size=5)
    trainer_of(FreezeEmbeddings(0.5), Watch(), gradient_clip_val=1.0).fit(module, data)
    assert runs == [0, 1, 2], "at step 2 to keep the captions, at step 3 no more"
    assert [whole > unet for whole, unet in norms] == [True, True, False, False]
    assert all(p.grad is None for p in module.embedding_parameters())


def test_15_placeholders_inside_words() -> None:
    words = Placeholders({"TOK": 1, "TOK2": 2})
    assert words.replace("TOK TOK2 TOKEN TOK, aTOK") == "<s0> <s1><s2> TOKEN <s0>, aTOK"


def test_16_clip_skip_ignored_with_frozen_encoders_and_in_validation(tiny: Path, batch: Batch) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny)
    for skip in (0, 1):
        context, *_ = pipe.encode_prompt("a photo", do_classifier_free_guidance=False, clip_skip=skip)
        for cache in (None, MemoryCache()):
            module = ready(tiny, tokens=None, clip_skip=skip, text_cache=cache)
            for mode in (True, False):
                seen = module.train(mode).denoise({**batch, "caption": ["a photo"] * 2}).keywords["conditioning"]  # type: ignore[attr-defined, typeddict-item]
                torch.testing.assert_close(seen.context[:1], context, rtol=0, atol=1e-5)


def test_17_false_is_true_and_zero_is_not_given(tiny: Path) -> None:
    cli = LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        args=[
            f"--config={ROOT / 'configs/quickstart.yaml'}",
            f"--model.pretrained={tiny}",
            "--model.gradient_checkpointing=False",
            "--model.embeddings_weight_decay=0.0",
            "--data.random_flip=false",
            "--trainer.logger=false",
        ],
    )
    assert cli.model.gradient_checkpointing is False
    assert cli.datamodule.views.random_flip is False
    cli.model.configure_model()
    decays = {group["name"]: group["weight_decay"] for group in cli.model.configure_optimizers().param_groups}
    assert decays == {"unet": 1e-4, "embeddings": 0.0}


def test_18_crops_drawn_once_for_all(colours: Path) -> None:
    data = data_of(colours, random_crop=True, random_flip=True, batch_size=1, repeats=3)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        epochs.append(sorted((b["caption"][0], tuple(b["crop_top_left"][0].tolist())) for b in loader))
    assert epochs[0] != epochs[1]
    assert len(set(epochs[0])) > len(COLOURS), "repeats are no copies"


def test_19_class_images_with_the_instances_size(colours: Path, tmp_path: Path) -> None:
    classes = pictures(tmp_path / "classes", {"white": (255, 255, 255)}, size=(40, 32))
    data = data_of(colours, prior=ClassImages(root=str(classes), prompt="none"), batch_size=5)
    data.setup("fit")
    sizes = {
        (caption, *size)
        for batch in data.train_dataloader()
        for caption, size in zip(batch["caption"], batch["original_size"].tolist(), strict=True)
    }
    assert ("white TOK", 32, 40) in sizes
    assert ("red TOK", 16, 24) in sizes


def test_20_exported_files_without_the_tokens(tiny: Path, colours: Path, tmp_path: Path) -> None:
    prompt, side = "a TOK icon", 16
    pictures_of = ValidationImages([prompt], resolution=side, sampler=HeunSampler(4), guidance_scale=1.0)
    save = SaveAdapter("x")
    module = module_of(tiny, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.05))
    trainer_of(pictures_of, save, default_root_dir=tmp_path).fit(module, data_of(colours))
    names: dict[str, Any] = {}
    described = save.write(module.trainer, module, tmp_path / "adapter")
    exec(described.usage().rsplit("\n", 1)[0], names)
    theirs = names["pipe"].encode_prompt("a <s0><s1> icon", do_classifier_free_guidance=False)
    ours = module.conditioner([prompt], torch.zeros(1, 6))
    torch.testing.assert_close(theirs[0], ours.context, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs[2], ours.pooled, rtol=0, atol=1e-5)
    untrained = module_of(tiny)
    untrained.configure_model()
    assert not torch.allclose(untrained.conditioner([prompt], torch.zeros(1, 6)).context, ours.context, atol=1e-3)


def test_21_latent_statistics_of_another_vae(tiny: Path, tiny_edm: Path) -> None:
    own = SDXLCheckpoint(str(tiny_edm)).load_vae(torch.float32)
    assert LatentSpace(own).mean.any()
    other = SDXLCheckpoint(str(tiny_edm), vae=str(tiny / "vae")).load_vae(torch.float32)
    assert not LatentSpace(other).mean.any()
    with pytest.warns(UserWarning, match="normalises latents in another way"):
        module_of(tiny_edm, vae=str(tiny / "vae"), loss=EDMLoss()).setup("validate")


def test_22_noise_offset_that_raises_the_noise() -> None:
    seen: list[Tensor] = []

    def watch(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x / sigma.view(-1, 1, 1, 1))
        return x

    torch.manual_seed(0)
    EDMLoss(noise_offset=0.5)(watch, torch.zeros(20_000, 4, 2, 2))
    assert seen[0].std().item() == pytest.approx(1, rel=0.01)


def test_23_an_optimizer_of_its_own_after_the_pivot(tiny: Path, colours: Path) -> None:
    """The schedule goes on with the same optimizer, and tokens accumulate gradients like the UNet."""
    half = {"lr_scheduler": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, 4)}
    module, seen = module_of(tiny, **half), []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: SDXLModule, optimizer: Any) -> None:
            seen.append((id(optimizer), [group["lr"] for group in optimizer.param_groups]))

    trainer_of(FreezeEmbeddings(0.5), Watch(), accumulate_grad_batches=2).fit(module, data_of(colours, batch_size=1))
    assert len({optimizer for optimizer, _ in seen}) == 1
    assert [rates for _, rates in seen] == [pytest.approx([1e-3 * (1 - step / 4)] * 2) for step in range(4)]

    ends = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        whole = module_of(tiny, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
        whole.encode = lambda batch: batch["image"][:, :1, ::2, ::2].expand(-1, 4, -1, -1)  # type: ignore[method-assign]
        whole.loss = Deterministic(UniformTimesteps(), SNRWeighting())
        data = data_of(colours, batch_size=batch_size, repeats=4)
        trainer_of(max_steps=2, accumulate_grad_batches=accumulate).fit(whole, data)
        ends.append(torch.cat([p.detach().flatten() for p in whole.parameters() if p.requires_grad]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)


class Deterministic(EDMLoss):
    """The error at sigma = 1 without noise."""

    def __call__(self, denoise: Any, clean: Tensor, *_: Any, **__: Any) -> Tensor:
        return (denoise(clean, torch.ones(len(clean))) - clean).square().flatten(1).mean(1)


PLAIN = {"loss": EDMLoss(UniformTimesteps(), SNRWeighting())}
CHANGES = {
    "noise_offset": {"loss": EDMLoss(UniformTimesteps(), SNRWeighting(), noise_offset=0.1)},
    "input_perturbation": {"loss": EDMLoss(UniformTimesteps(), SNRWeighting(), input_perturbation=0.1)},
    "min_snr": {"loss": EDMLoss(UniformTimesteps(), MinSNRWeighting(5.0, 1.0))},
    "gamma": {"loss": EDMLoss(UniformTimesteps(), MinSNRWeighting(1.0, 1.0))},
    "soft_min_snr": {"loss": EDMLoss(UniformTimesteps(), SoftMinSNRWeighting(1.0))},
    "clip_skip": {**PLAIN, "clip_skip": 1},
    "pool_at_end": {**PLAIN, "pool_at_end": False},
    "initializers": {**PLAIN, "initializers": {"TOK": "icon"}},
}


def test_24_settings_that_are_parsed_and_never_used(tiny: Path, batch: Batch) -> None:
    losses = {}
    for name, settings in {"plain": PLAIN, **CHANGES}.items():
        module = ready(tiny, **settings)
        with torch.no_grad():
            for number, (key, parameter) in enumerate(module.named_parameters()):
                if "lora_" in key:  # alike, whatever random numbers a setting takes before
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
                elif key.endswith("rows") and name != "initializers":
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
        torch.manual_seed(3)
        rows: Any = {key: [*value] * 8 if key == "caption" else torch.cat([value] * 8) for key, value in batch.items()}  # type: ignore[arg-type, list-item]
        losses[name] = float(module.loss(module.denoise(rows), module.encode(rows)).mean())
    assert len({round(loss, 6) for loss in losses.values()}) == len(losses), losses


def test_25_prodigy_with_another_rate_for_text_encoders(tiny: Path, colours: Path) -> None:
    recorder = Recorder()
    module = module_of(
        tiny, text_encoder_adapter=LoRA(rank=2), text_encoders_lr=0.5, embeddings_lr=0.25, optimizer=GroupedProdigy
    )
    trainer_of(recorder).fit(module, data_of(colours))
    assert all(map(math.isfinite, recorder.losses))
    groups = module.optimizers().param_groups  # type: ignore[union-attr]
    assert {group["name"]: group["lr"] for group in groups} == {"unet": 1.0, "text_encoders": 0.5, "embeddings": 0.25}


@pytest.mark.parametrize("prior", ["folder", "teacher"])
def test_26_priors_with_frozen_text_encoders(tiny: Path, colours: Path, tmp_path: Path, prior: str) -> None:
    classes = pictures(tmp_path / "classes", COLOURS)
    kinds = {"folder": ClassImages(root=str(classes), prompt="none"), "teacher": TeacherPrior(prompt="an icon")}
    recorder = Recorder()
    trainer_of(recorder).fit(module_of(tiny, tokens=None), data_of(colours, prior=kinds[prior]))
    assert len(recorder.losses) == 4
    assert all(map(math.isfinite, recorder.losses))


def test_27_nested_and_absolute_output_folders(tiny: Path, colours: Path, tmp_path: Path) -> None:
    root = tmp_path / "some" / "deep.folder" / "run"
    trainer_of(SaveAdapter("x"), max_steps=1, default_root_dir=root.resolve()).fit(module_of(tiny), data_of(colours))
    assert (root / "adapter" / "x_emb.safetensors").is_file()
    with pytest.raises(InputError, match="name"):
        SaveAdapter("nested/x")


def test_28_files_that_are_no_images_and_broken_ones(tiny: Path, colours: Path) -> None:
    for name in (".DS_Store", "notes.md", "Thumbs.db", ".hidden.png"):
        (colours / name).write_bytes(b"no image")
    data = data_of(colours)
    data.setup("fit")
    assert len(data.captions()) == len(COLOURS)
    (colours / "red.png").write_bytes((colours / "red.png").read_bytes()[:40])
    with pytest.raises(InputError, match=r"red\.png cannot be read as an image"):
        data_of(colours).setup("fit")


def test_29_min_snr_under_edm(tiny_edm: Path, colours: Path) -> None:
    recorder = Recorder()
    module = module_of(tiny_edm, loss=EDMLoss(LogNormal(), MinSNRWeighting(5.0, 0.5)))
    trainer_of(recorder).fit(module, data_of(colours))
    assert all(map(math.isfinite, recorder.losses))


def test_30_resumed_with_nothing_left_to_train(tiny: Path, colours: Path, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=1)
    trainer_of(keep, max_steps=2, enable_checkpointing=True).fit(module_of(tiny), data_of(colours))
    recorder, save = Recorder(), SaveAdapter("x")
    trainer = trainer_of(FreezeEmbeddings(0.5), recorder, save, max_steps=2, default_root_dir=tmp_path)
    trainer.fit(module_of(tiny), data_of(colours), ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert recorder.losses == []
    assert (tmp_path / "adapter" / "x_emb.safetensors").is_file()
