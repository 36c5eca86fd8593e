"""Pictures of `predict` are those of diffusers' pipeline with the same files, whatever the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_edm.data import CaptionedImagesDataModule, PromptsDataModule
from lit_edm.edm import DPMSolverSampler, EulerSampler, HeunSampler, Sampler, sample_heun
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.modules.generation import AdapterFile, Generation, samples_alone
from lit_edm.sdxl import DiffusersSampler, DoRA, LoHa, LoRA
from lit_edm.sdxl.formats import read_adapter, write_diffusers, write_embeddings, write_kohya
from lit_edm.sdxl.injection import weights_of

PROMPTS = ["a drawing of TOK, a red apple", "TOK in the snow"]
EULER = DiffusersSampler("EulerAncestralDiscreteScheduler", 4)


def trained(base: Path, adapter: Any, text_encoder_adapter: Any = None, seed: int = 0) -> SDXLModule:
    """A module whose trained values are far from where they start, as after training."""
    torch.manual_seed(seed)
    module = SDXLModule(str(base), tokens={"TOK": 2}, adapter=adapter, text_encoder_adapter=text_encoder_adapter)
    module.configure_model()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.data += (1.0 if name.endswith("rows") else 0.2) * torch.randn_like(parameter)
    return module.eval()


@pytest.fixture(scope="module")
def files(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA of all networks and two new tokens, and files of a DoRA and of a LoHa."""
    folder = tmp_path_factory.mktemp("files")
    module = trained(tiny, LoRA(rank=2, alpha=3.0), LoRA(rank=3))
    weights = weights_of(module.networks(), module.conditioner.new_embeddings())
    write_diffusers(weights, folder / "lora" / "pytorch_lora_weights.safetensors")
    write_embeddings(weights, folder / "lora" / "lora_emb.safetensors")
    for name, adapter in (("dora", DoRA(rank=2)), ("loha", LoHa(rank=2))):
        write_kohya(weights_of(trained(tiny, adapter, seed=1).networks()), folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def predict(tiny: Path, trainer: Callable[..., Trainer]) -> Callable[..., list[Tensor]]:
    """Renders prompts as `lit-edm predict` does; returns the pictures, (3, H, W) each, in order."""

    def run(generation: Generation, data: dict[str, Any] | None = None, **settings: Any) -> list[Tensor]:
        module = SDXLModule(str(tiny), **({"adapter": None, "generation": generation} | settings))
        prompts = PromptsDataModule(**({"prompts": PROMPTS, "height": 16, "width": 24} | (data or {})))
        batches: Any = trainer().predict(module, prompts)
        return [picture for batch in batches for picture in batch]

    return run


def pictures_of_pipeline(tiny: Path, folder: Path, seed: int, scale: float) -> Tensor:
    """The same by diffusers alone."""
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder, adapter_name="trained")
    pipe.set_adapters("trained", scale)
    rows = load_file(folder / "lora_emb.safetensors")
    for name, tokenizer, encoder in (
        ("clip_l", pipe.tokenizer, pipe.text_encoder),
        ("clip_g", pipe.tokenizer_2, pipe.text_encoder_2),
    ):
        pipe.load_textual_inversion(list(rows[name]), ["<s0>", "<s1>"], text_encoder=encoder, tokenizer=tokenizer)
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe(
        [prompt.replace("TOK", "<s0><s1>") for prompt in PROMPTS],
        height=16,
        width=24,
        num_inference_steps=EULER.num_steps,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for _ in PROMPTS],
        output_type="pt",
    ).images


def test_pictures_of_the_pipeline_with_adapter_scale_and_tokens(
    tiny: Path, files: Path, predict: Callable[..., list[Tensor]]
) -> None:
    generation = Generation((AdapterFile(str(files / "lora"), scale=0.8),), sampler=EULER, guidance_scale=3.0)
    grid = {"seeds": (3, 4), "adapter_scales": (0.5, 1.0), "batch_size": 2}
    pictures = predict(generation, grid, tokens={"TOK": 2})
    expected = [pictures_of_pipeline(tiny, files / "lora", s, 0.8 * x) for x in (0.5, 1.0) for s in (3, 4)]
    found = (torch.stack(pictures) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-4)
    assert len({picture.numpy().tobytes() for picture in pictures}) == 8


@pytest.mark.parametrize("sampler", [EULER, DPMSolverSampler(4), HeunSampler(3), HeunSampler(3, s_churn=2.0)], ids=repr)
def test_batches_and_order_change_nothing(predict: Callable[..., list[Tensor]], sampler: Sampler) -> None:
    generation = Generation(sampler=sampler, guidance_scale=3.0)
    prompts = {"prompts": ["a", "b", "c"], "seeds": (7, 8)}
    single = predict(generation, prompts)
    for batch_size in (2, 5):
        for one, other in zip(single, predict(generation, prompts | {"batch_size": batch_size}), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    backwards = predict(generation, {"prompts": ["c", "b", "a"], "seeds": (8, 7), "batch_size": 4})
    torch.testing.assert_close(torch.stack(backwards[::-1]), torch.stack(single), rtol=0, atol=1e-4)


def test_several_files_of_several_kinds_add_up(tiny: Path, files: Path, predict: Callable[..., list[Tensor]]) -> None:
    """By the weights: W plus each file's own update times its scale, where the update is linear in its scale."""
    paths = [str(files / name) for name in ("lora", "loha.safetensors")]
    generation = Generation(tuple(AdapterFile(path, 0.5) for path in paths), sampler=EULER)
    both = predict(generation, {"prompts": ["a cat"]}, tokens={"TOK": 2})
    one = predict(Generation(generation.adapters[:1], sampler=EULER), {"prompts": ["a cat"]}, tokens={"TOK": 2})
    assert not torch.allclose(both[0], one[0], atol=1e-3)

    module = SDXLModule(str(tiny), adapter=None)
    module.configure_model()
    for path in paths:
        for prefix, network in module.networks().items():
            for name, update in read_adapter(Path(path)).networks.get(prefix, {}).items():
                own = name if hasattr(network, "text_model") or prefix == "unet" else name.removeprefix("text_model.")
                weight = network.get_submodule(own).weight
                weight.data += 0.5 * update.delta(weight)
    request: Any = {"prompt": "a cat", "size": (16, 24), "seed": 0}
    module.generation = Generation(sampler=EULER)
    torch.testing.assert_close(both[0], module.render([request])[0], rtol=0, atol=1e-4)


def test_without_scale_there_is_no_adapter(files: Path, predict: Callable[..., list[Tensor]]) -> None:
    adapted = Generation((AdapterFile(str(files / "loha.safetensors")),), sampler=EULER)
    data = {"prompts": ["a cat"], "adapter_scales": (0.0, 1.0)}
    none, whole = predict(adapted, data)
    torch.testing.assert_close(none, predict(Generation(sampler=EULER), {"prompts": ["a cat"]})[0], rtol=0, atol=1e-5)
    assert not torch.allclose(none, whole, atol=1e-3)


def test_settings_change_the_picture(files: Path, predict: Callable[..., list[Tensor]]) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"guidance_scale": 1.0},
        {"guidance_interval": (0.5, 2.0)},
        {"negative_prompt": "an apple"},
        {"sampler": EulerSampler(4)},
        {"adapters": (AdapterFile(str(files / "dora.safetensors")),)},
    ]
    pictures = [predict(Generation(**({"sampler": EULER} | each)), {"prompts": ["a"]})[0] for each in settings]
    for index, one in enumerate(pictures):
        for other in pictures[:index]:
            assert not torch.allclose(one, other, atol=1e-3)


def test_a_checkpoint_is_rendered_with_files_beside_it(
    tiny: Path, files: Path, icons: Path, tmp_path: Path, trainer: Callable[..., Trainer]
) -> None:
    """The checkpoint knows nothing of the files, and its tokens stay as they are."""
    settings: dict[str, Any] = {"tokens": {"TOK": 1}, "adapter": LoRA(rank=2)}
    fitted = SDXLModule(str(tiny), **settings)
    fit = trainer(max_steps=1)
    fit.fit(fitted, CaptionedImagesDataModule(icons, resolution=16))
    fit.save_checkpoint(tmp_path / "one.ckpt")
    generation = Generation((AdapterFile(str(files / "dora.safetensors")),), sampler=EULER)
    module = SDXLModule(str(tiny), **settings, generation=generation)
    data = PromptsDataModule(["TOK"], height=16, width=16)
    pictures: Any = trainer().predict(module, data, ckpt_path=tmp_path / "one.ckpt")
    names = {name for name, _ in fitted.named_parameters()}
    after = dict(module.named_parameters())
    learned = {name for name, p in fitted.named_parameters() if p.requires_grad}
    assert all(after[name].equal(fitted.get_parameter(name)) for name in learned & after.keys())
    assert after.keys() > {name for name in names if "lora_" in name}
    assert torch.isfinite(pictures[0]).all()
    assert {name for name, p in module.named_parameters() if p.requires_grad} == learned


def test_which_samplers_get_one_picture_at_a_time() -> None:
    class Elsewhere(Sampler):
        evaluations = 1

        def __call__(self, denoise: Any, noise: Tensor, *_: Any) -> Tensor:
            return sample_heun(denoise, noise, torch.tensor([1.0, 0.0]), s_churn=1.0)

    assert [samples_alone(s) for s in (Elsewhere(), HeunSampler(s_churn=1.0))] == [True, True]
    assert not any(samples_alone(sampler) for sampler in (HeunSampler(), EulerSampler(), DPMSolverSampler(), EULER))


class TestMistakes:
    """One line each, before weights are loaded."""

    @pytest.fixture(autouse=True)
    def no_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr("lit_edm.sdxl.SDXLCheckpoint.load_unet")

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (
                {"height": 17},
                "data.init_args.height is 17, which is not a multiple of 2, the VAE's factor; choose 16",
            ),
            ({"width": 1}, "data.init_args.width is 1, which is not a multiple of 2, the VAE's factor; choose 2"),
            ({"adapter_scales": (1.0, 0.5)}, "data.init_args.adapter_scales holds 0.5, but there is no adapter from a"),
            ({"prompts": []}, "there is no prompt"),
        ],
    )
    def test_of_the_requests(self, predict: Callable[..., Any], data: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError) as error:
            predict(Generation(), data)
        assert said in str(error.value)

    def test_of_files(self, files: Path, tmp_path: Path, predict: Callable[..., Any]) -> None:
        lora = (AdapterFile(str(files / "lora")),)
        with pytest.raises(InputError, match=r"nowhere\.safetensors"):
            predict(Generation((AdapterFile("nowhere.safetensors"),)))
        with pytest.raises(InputError, match=r"asks for 3 new tokens, but .* hold 2"):
            predict(Generation(lora), tokens={"TOK": 3})
        with pytest.raises(InputError, match=r"asks for 0 new tokens, but .* hold 2"):
            predict(Generation(lora))
        save_file({"clip_l": torch.zeros(2, 32)}, tmp_path / "half.safetensors")
        with pytest.raises(InputError, match="clip_g"):
            predict(Generation(embeddings=(str(tmp_path / "half.safetensors"),)), tokens={"TOK": 2})

    def test_of_the_sampler(self, predict: Callable[..., Any]) -> None:
        with pytest.raises(InputError, match="there is no EulerScheduler"):
            predict(Generation(sampler=DiffusersSampler("EulerScheduler")))

    def test_of_guidance(self) -> None:
        with pytest.raises(InputError, match=r"generation\.guidance_interval is \(2\.0, 1\.0\); it must be"):
            Generation(guidance_interval=(2.0, 1.0))
        with pytest.raises(InputError, match=r"generation\.negative_prompt has no effect without guidance"):
            Generation(guidance_scale=1.0, negative_prompt="x")

    def test_no_prompts_to_render(self, tiny: Path, icons: Path, trainer: Callable[..., Trainer]) -> None:
        data = CaptionedImagesDataModule(icons, resolution=16)
        data.predict_dataloader = data.train_dataloader  # type: ignore[method-assign]
        with pytest.raises(InputError, match="data has no prompts to render; write PromptsDataModule"):
            trainer().predict(SDXLModule(str(tiny)), data)


def test_embeddings_of_another_base(tmp_path: Path, predict: Callable[..., Any]) -> None:
    save_file({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, tmp_path / "xl.safetensors")
    with pytest.raises(InputError, match=r"clip_l have 768 values a token, but the base's text encoder has 32"):
        predict(Generation(embeddings=(str(tmp_path / "xl.safetensors"),)), tokens={"TOK": 2})


def test_tokens_that_nobody_has_learned(
    tiny: Path, trainer: Callable[..., Trainer], predict: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match=r"tokens: TOK has no embeddings; name their file in model\.init_args\.gen"):
        predict(Generation(sampler=EULER), tokens={"TOK": 2})
    learned = trained(tiny, None)
    learned.generation = Generation(sampler=EULER)
    pictures: Any = trainer().predict(learned, PromptsDataModule(["TOK"], height=16, width=16))
    assert torch.isfinite(pictures[0]).all()


def test_the_networks_are_as_they_were_afterwards(
    tiny: Path, files: Path, icons: Path, trainer: Callable[..., Trainer]
) -> None:
    """So that the same module can be trained, saved, and rendered with other files."""
    module = trained(tiny, LoRA(rank=2))
    names, trained_names = list(module.state_dict()), [n for n, p in module.named_parameters() if p.requires_grad]
    data = PromptsDataModule(["TOK"], height=16, width=16)
    pictures = []
    for path in ("lora", "loha.safetensors", "loha.safetensors"):
        module.generation = Generation((AdapterFile(str(files / path)),), sampler=EULER)
        pictures.append(trainer().predict(module, data))
        assert list(module.state_dict()) == names
        assert [n for n, p in module.named_parameters() if p.requires_grad] == trained_names
    assert pictures[1][0].equal(pictures[2][0])
    assert not torch.allclose(pictures[0][0], pictures[1][0], atol=1e-3)
    run = trainer(max_steps=1)
    run.fit(module, CaptionedImagesDataModule(icons, resolution=16))
    assert weights_of(module.networks()).networks.keys() == {"unet"}
