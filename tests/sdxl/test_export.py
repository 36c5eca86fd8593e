from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from lit_edm.edm import guided, karras_sigmas, sample_euler
from lit_edm.modules import SDXLModule
from lit_edm.modules.prior import blank_batch
from lit_edm.sdxl import DoRA, FullFinetune, LoCon, LoHa, LoKr, LoRA, SDXLCheckpoint
from lit_edm.sdxl.card import AdapterFolder, as_cell
from lit_edm.sdxl.export import LORA_FILE, Exported, export, lora_state_dict, lycoris_state_dict, save_embeddings
from lit_edm.sdxl.low_rank import updated_layers

PROMPT = "a 3d icon in the style of TOK, a red apple"
SIGMAS = karras_sigmas(6, 0.03, 14.6)
SIDE, SCALE = 16, 3.0


ADAPTERS: dict[str, Any] = {
    "lora": LoRA(rank=3, alpha=6.0),
    "rslora": LoRA(rank=3, alpha=2.0, rank_stabilized=True),
    "dora": DoRA(rank=3, alpha=1.0),
    "locon": LoCon(rank=3, alpha=2.0, conv_rank=4),
    "pissa": LoRA(rank=3, alpha=2.0, init="pissa"),
    "olora": LoRA(rank=3, init="olora"),
    "ranks": LoRA(rank=3, ranks={"*.0": 5}, alphas={"*.0": 2.0}),
    "full": FullFinetune(),
}


def trained_module(base: Path, adapter: Any = LoRA(rank=3, alpha=6.0), **settings: Any) -> SDXLModule:
    """A module whose trained values are far from where they start, as after training."""
    torch.manual_seed(0)
    module = SDXLModule(str(base), adapter=adapter, **({"tokens": {"TOK": 2}} | settings))
    module.configure_model()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            std = 1.0 if name.endswith("rows") else 0.2 if "lora_" in name else 0.05  # more amplifies rounding, too
            parameter.data += std * torch.randn_like(parameter)
    return module.eval()


def networks_of(module: SDXLModule) -> dict[str, nn.Module]:
    first, second = module.conditioner.encoders
    return {"unet": module.denoiser.unet, "text_encoder": first, "text_encoder_2": second}


def described(module: SDXLModule, folder: Path) -> AdapterFolder:
    exported = export(networks_of(module), folder, "x")
    if embeddings := module.conditioner.new_embeddings():
        save_embeddings(embeddings, folder / "x_emb.safetensors")
    return AdapterFolder(
        folder=folder,
        checkpoint=module.checkpoint,
        exported=exported,
        tokens=module.placeholders.tokens,
        pool_at_end=module.pool_at_end,
        clip_skip=module.clip_skip,
        embeddings="x_emb.safetensors",
        prompts=[module.placeholders.replace(PROMPT)],
        pictures=[],
        config="",
    )


def pipeline_by(usage: str) -> StableDiffusionXLPipeline:
    """Runs the code of the model card, up to the picture, in a fresh namespace."""
    names: dict[str, Any] = {}
    exec(usage.rsplit("\n", 1)[0], names)
    return names["pipe"]


def rendered_by_module(module: SDXLModule, noise: Tensor) -> Tensor:
    batch = blank_batch([PROMPT], (SIDE, SIDE), module.device)
    with torch.no_grad():
        denoise = guided(module.denoise(batch), module.denoise_unconditionally(batch), SCALE)
        return module.decode(sample_euler(denoise, noise * SIGMAS[0], SIGMAS)).clamp(-1, 1) / 2 + 0.5


def rendered_by_pipeline(pipe: StableDiffusionXLPipeline, noise: Tensor, clip_skip: int) -> Tensor:
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    pipe.scheduler.register_to_config(use_karras_sigmas=False)
    return pipe(
        "a 3d icon in the style of <s0><s1>, a red apple",
        sigmas=SIGMAS.tolist(),
        guidance_scale=SCALE,
        height=SIDE,
        width=SIDE,
        latents=noise * SIGMAS[0] / pipe_init_sigma(pipe),
        output_type="pt",
        clip_skip=clip_skip or None,
    ).images


def pipe_init_sigma(pipe: StableDiffusionXLPipeline) -> float:
    """The factor that the pipeline puts on given latents."""
    pipe.scheduler.set_timesteps(sigmas=SIGMAS.tolist())
    return float(pipe.scheduler.init_noise_sigma)


def largest_difference(module: SDXLModule, usage: str) -> float:
    """Between pixels, in [0, 1], of the module and of a pipeline that loads its files."""
    noise = torch.randn(1, *module.latents.shape(SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    ours = rendered_by_module(module, noise)
    assert ours.std() > 0.05
    return (ours - rendered_by_pipeline(pipeline_by(usage), noise, module.clip_skip)).abs().max().item()


@pytest.mark.parametrize("texts", [False, True], ids=["unet", "unet_and_text_encoders"])
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_fresh_pipeline_renders_the_same_pixels(
    tiny: Path, tmp_path: Path, adapter: Any, texts: bool, record_property: Callable[[str, object], None]
) -> None:
    module = trained_module(tiny, adapter, text_encoder_adapter=adapter if texts else None)
    files = described(module, tmp_path / "adapter")
    difference = largest_difference(module, files.usage())
    record_property("largest difference of a pixel in [0, 1]", difference)
    assert difference < 1e-4
    networks = ("unet", "text_encoder", "text_encoder_2") if texts else ("unet",)
    assert files.exported.lora + files.exported.whole == networks

    plain = "\n".join(line for line in files.usage().splitlines() if "load_lora_weights" not in line)
    for network in networks:
        plain = plain.replace(f", {network}={network}", "")
    assert largest_difference(module, plain) > 0.02, "the adapter would change nothing"


@pytest.mark.parametrize("pool_at_end", [True, False])
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_a_fresh_pipeline_encodes_the_same_prompt(
    tiny: Path, tmp_path: Path, pool_at_end: bool, clip_skip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_edm.modules.sdxl.check_clip_skip", lambda *_: None)  # the tiny base has two layers
    module = trained_module(tiny, pool_at_end=pool_at_end, clip_skip=clip_skip, text_encoder_adapter=LoRA(rank=2))
    files = described(module, tmp_path / "adapter")
    assert (f", clip_skip={clip_skip})" in files.usage()) == bool(clip_skip)
    assert largest_difference(module, files.usage()) < 1e-4
    without_tokens = files.usage().replace("_emb.safetensors", "_emb0.safetensors")
    zeros = {name: torch.zeros_like(rows) for name, rows in load_file(files.folder / "x_emb.safetensors").items()}
    save_embeddings(zeros, files.folder / "x_emb0.safetensors")
    assert largest_difference(module, without_tokens) > 1e-3, "the tokens would change nothing"


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_lora_file_holds_the_whole_update(tiny: Path, init: Any) -> None:
    unet = SDXLCheckpoint(str(tiny)).load_unet(torch.float32)
    LoRA(rank=3, alpha=6.0, ranks={"mid_block": 5}, init=init)(unet)
    for layer in updated_layers(unet).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    weights = lora_state_dict(unet)
    names = {name.removeprefix("unet.").rsplit(".lora_", 1)[0] for name in weights}
    assert names == updated_layers(unet).keys()
    assert len(weights) == 2 * len(names)
    assert {weights[f"unet.{name}.lora_A.weight"].shape[0] for name in names} == {5 if init == "default" else 10}
    for name, layer in updated_layers(unet).items():
        update = weights[f"unet.{name}.lora_B.weight"] @ weights[f"unet.{name}.lora_A.weight"]
        x = torch.randn(2, layer.in_features)
        torch.testing.assert_close(x @ update.T, layer(x) - layer.get_base_layer()(x), rtol=1e-3, atol=1e-4)


def test_lora_names_are_those_that_old_and_new_versions_read(tiny: Path) -> None:
    first, second = SDXLCheckpoint(str(tiny)).load_text_encoders(torch.float32)
    for encoder, prefix in ((first, "text_encoder"), (second, "text_encoder_2")):
        DoRA(target_modules=("q_proj",))(encoder)
        layer = f"{prefix}.text_model.encoder.layers.0.self_attn.q_proj"
        names = {name for name in lora_state_dict(encoder, prefix) if name.startswith(layer)}
        assert names == {f"{layer}.{n}.weight" for n in ("lora_A", "lora_B", "lora_magnitude_vector")}


def updates_by_kohya_name(path: Path) -> dict[str, Tensor]:
    """Reads a LyCORIS file as the programs around it do."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(path).items():
        layer, _, factor = key.partition(".")
        layers.setdefault(layer, {})[factor] = value
    updates = {}
    for layer, factors in layers.items():
        if "hada_w1_a" in factors:
            rank = len(factors["hada_w1_b"])
            first, second = (factors[f"hada_w{n}_a"] @ factors[f"hada_w{n}_b"] for n in (1, 2))
            updates[layer] = factors["alpha"] / rank * first * second
            continue
        ranks = [len(factors[f"lokr_w{n}_b"]) for n in (1, 2) if f"lokr_w{n}_b" in factors]
        scale = factors["alpha"] / ranks[0] if ranks else 1.0
        first, second = (
            factors[f"lokr_w{n}"] if f"lokr_w{n}" in factors else factors[f"lokr_w{n}_a"] @ factors[f"lokr_w{n}_b"]
            for n in (1, 2)
        )
        first = first.reshape(*first.shape, *[1] * (second.ndim - 2))
        updates[layer] = scale * torch.kron(first, second)
    return updates


@pytest.mark.parametrize(
    "adapter",
    [
        LoHa(rank=3, alpha=6.0),
        LoHa(rank=2, ranks={"*.0": 4}),
        LoKr(rank=1, alpha=3.0, factor=2),
        LoKr(rank=50, alpha=3.0),  # nothing of low rank
    ],
    ids=str,
)
def test_lycoris_files_hold_the_whole_update(tiny: Path, tmp_path: Path, adapter: Any) -> None:
    of_unet = replace(adapter, target_modules=("to_q", "ff.net.2", "conv1", "conv_shortcut"))
    module = trained_module(tiny, of_unet, text_encoder_adapter=adapter)
    exported = export(networks_of(module), tmp_path, "x")
    assert exported == Exported((), ("unet", "text_encoder", "text_encoder_2"), (), "x_lycoris.safetensors")
    updates = updates_by_kohya_name(tmp_path / exported.lycoris_file)
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in updates
    base = trained_module(tiny, of_unet, text_encoder_adapter=adapter)
    base.load_state_dict(module.state_dict())
    prefixes = ("lora_unet_", "lora_te1_text_model_", "lora_te2_")
    for prefix, network in zip(prefixes, networks_of(base).values(), strict=True):
        for name, layer in updated_layers(network).items():
            update = updates.pop(prefix + name.replace(".", "_"))
            layer.get_base_layer().weight.data += update.reshape(layer.get_base_layer().weight.shape)
    assert not updates
    noise = torch.randn(1, *module.latents.shape(SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    ours = rendered_by_module(module, noise)
    with base.untouched():
        assert (ours - rendered_by_module(base, noise)).abs().max() < 1e-4
    with module.untouched():
        assert (ours - rendered_by_module(module, noise)).abs().max() > 1e-3


def test_whole_networks_are_published_in_float32_and_under_published_names(tiny: Path, tmp_path: Path) -> None:
    checkpoint = SDXLCheckpoint(str(tiny))
    first, second = checkpoint.load_text_encoders(torch.bfloat16)
    networks = {"unet": checkpoint.load_unet(torch.bfloat16), "text_encoder": first, "text_encoder_2": second}
    for network in networks.values():
        FullFinetune(("*.0",))(network)
    assert export(networks, tmp_path, "x").whole == tuple(networks)
    files = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
    for name, file in files.items():
        published, ours = (load_file(folder / name / f"{file}.safetensors") for folder in (tiny, tmp_path))
        assert published.keys() == ours.keys()
        assert {value.dtype for value in ours.values()} == {torch.float32}
    for loaded in (
        CLIPTextModel.from_pretrained(tmp_path / "text_encoder"),
        UNet2DConditionModel.from_pretrained(tmp_path / "unet"),
    ):
        assert loaded.dtype == torch.float32


def test_nothing_trained_leaves_no_file(tiny: Path, tmp_path: Path) -> None:
    module = trained_module(tiny, None)
    assert export(networks_of(module), tmp_path, "x") == Exported((), (), (), "x_lycoris.safetensors")
    assert not list(tmp_path.iterdir())
    assert lora_state_dict(module.denoiser.unet) == lycoris_state_dict(module.denoiser.unet) == {}


def test_files_are_float32_and_named_as_diffusers_looks_for_them(tiny: Path, tmp_path: Path) -> None:
    files = described(trained_module(tiny), tmp_path)
    assert LORA_FILE == "pytorch_lora_weights.safetensors"
    assert {path.name for path in tmp_path.iterdir()} == {LORA_FILE, files.embeddings}
    embeddings = load_file(tmp_path / files.embeddings)
    assert {name: rows.shape for name, rows in embeddings.items()} == {"clip_l": (2, 32), "clip_g": (2, 48)}
    for path in tmp_path.iterdir():
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"


class TestCard:
    def test_names_base_words_pictures_and_config(self, tiny: Path, tmp_path: Path) -> None:
        files = described(trained_module(tiny), tmp_path / "icons")
        card = replace(files, prompts=["a <s0><s1> | *x*"], pictures=["sample_00.png"], config="a: 1").card()
        header, body = card.split("---\n")[1], card.split("---\n", 2)[2]
        data = yaml.safe_load(header)
        assert data["base_model"] == str(tiny)
        assert data["instance_prompt"] == "a <s0><s1> | *x*"
        assert data["widget"] == [{"text": "a <s0><s1> | *x*", "output": {"url": "sample_00.png"}}]
        assert {"lora", "template:sd-lora"} < set(data["tags"])
        assert f"LoRA (unet), new tokens for `{tiny}`" in body
        assert "- write `<s0><s1>` where the captions had `TOK`" in body
        assert r"| a \<s0\>\<s1\> \| \*x\* | ![](sample_00.png) |" in body
        assert f"```python\n{files.usage().splitlines()[0]}" in body
        assert "```yaml\na: 1\n```" in body

    def test_usage_without_tokens_and_with_another_vae(self, tiny: Path, tmp_path: Path) -> None:
        module = trained_module(tiny, vae=str(tiny / "vae"), tokens=None)
        files = described(module, tmp_path)
        assert "load_textual_inversion" not in files.usage()
        pipe = pipeline_by(files.usage())
        assert np.isfinite(pipe("an apple", num_inference_steps=1, height=16, width=16, output_type="np").images).all()

    def test_says_which_programs_read_lycoris(self, tiny: Path, tmp_path: Path) -> None:
        files = described(trained_module(tiny, LoKr(rank=2)), tmp_path)
        card = files.card()
        assert "`x_lycoris.safetensors` has the layout of LyCORIS: ComfyUI" in card
        assert "`x_emb.safetensors` has the new tokens" in card
        assert "```python" not in card
        assert {"lycoris"} == {"lora", "lycoris", "template:sd-lora"} & set(
            yaml.safe_load(card.split("---\n")[1])["tags"]
        )

    def test_names_what_each_network_has(self, tiny: Path, tmp_path: Path) -> None:
        files = described(trained_module(tiny, text_encoder_adapter=FullFinetune(), tokens=None), tmp_path)
        assert f"LoRA (unet), weights (text_encoder, text_encoder_2) for `{tiny}`" in files.card()

    def test_prompts_cannot_break_the_table(self) -> None:
        assert as_cell("a | b\n# c <img>") == r"a \| b \# c \<img\>"
