from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from lit_edm.edm import guided, karras_sigmas, sample_euler
from lit_edm.modules import SDXLModule
from lit_edm.modules.prior import blank_batch
from lit_edm.sdxl import DoRA, FullFinetune, LoCon, LoHa, LoKr, LoRA, SDXLCheckpoint
from lit_edm.sdxl.card import AdapterFolder
from lit_edm.sdxl.export import LORA_FILE, Exported, Format, export
from lit_edm.sdxl.formats import write_embeddings, write_merged
from lit_edm.sdxl.formats.writing import diffusers_tensors, loras_of
from lit_edm.sdxl.injection import weights_of
from lit_edm.sdxl.low_rank import updated_layers
from lit_edm.sdxl.updates import AdapterWeights

PROMPT = "a 3d icon in the style of TOK, a red apple"
SIGMAS = karras_sigmas(6, 0.03, 14.6)
SIDE, SCALE = 16, 3.0
LAYERS = ("to_q", "ff.net.2", "conv1", "conv_shortcut")


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


def lora_tensors(network: nn.Module, name: str = "unet") -> dict[str, Tensor]:
    return diffusers_tensors(loras_of(weights_of({name: network})))


def described(module: SDXLModule, folder: Path) -> AdapterFolder:
    exported = export(networks_of(module), folder, "x", module.conditioner.new_embeddings(), module.placeholders.counts)
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
    write_embeddings(AdapterWeights({}, zeros), files.folder / "x_emb0.safetensors")
    assert largest_difference(module, without_tokens) > 1e-3, "the tokens would change nothing"


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_lora_file_holds_the_whole_update(tiny: Path, init: Any) -> None:
    unet = SDXLCheckpoint(str(tiny)).load_unet(torch.float32)
    LoRA(rank=3, alpha=6.0, ranks={"mid_block": 5}, init=init)(unet)
    for layer in updated_layers(unet).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    weights = lora_tensors(unet)
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
        names = {name for name in lora_tensors(encoder, prefix) if name.startswith(layer)}
        assert names == {f"{layer}.{n}.weight" for n in ("lora_A", "lora_B", "lora_magnitude_vector")}


def deltas_of_diffusers(path: Path) -> dict[str, Tensor]:
    """Reads what diffusers' format says: W + B A, by network and layer, and DoRA's magnitudes."""
    tensors = load_file(path)
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    found = {}
    for name in names:
        a, b = tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight")
        found[name] = torch.einsum("or,ri...->oi...", b.flatten(1), a)
        for suffix in ("", ".weight"):
            if (key := f"{name}.lora_magnitude_vector{suffix}") in tensors:
                found[f"{name}.magnitude"] = tensors.pop(key).flatten()
    assert not tensors
    return found


def deltas_of_kohya(path: Path) -> dict[str, Tensor]:
    """Reads a file as the programs around kohya's scripts and LyCORIS do: W + alpha / rank times a product."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(path).items():
        layer, _, factor = key.partition(".")
        layers.setdefault(layer, {})[factor] = value
    found = {}
    for layer, factors in layers.items():
        alpha = factors.pop("alpha")
        if "lora_up.weight" in factors:
            down, up = factors["lora_down.weight"], factors["lora_up.weight"]
            found[layer] = alpha / len(down) * torch.einsum("or,ri...->oi...", up.flatten(1), down)
            if "dora_scale" in factors:
                assert factors["dora_scale"].shape == (len(up), 1)
                found[f"{layer}.magnitude"] = factors["dora_scale"].flatten()
        elif "hada_w1_a" in factors:
            first, second = (factors[f"hada_w{n}_a"] @ factors[f"hada_w{n}_b"] for n in (1, 2))
            found[layer] = alpha / len(factors["hada_w1_b"]) * first * second
        else:
            ranks = [len(factors[f"lokr_w{n}_b"]) for n in (1, 2) if f"lokr_w{n}_b" in factors]
            scale = alpha / ranks[0] if ranks else 1.0
            first, second = (
                factors[f"lokr_w{n}"] if f"lokr_w{n}" in factors else factors[f"lokr_w{n}_a"] @ factors[f"lokr_w{n}_b"]
                for n in (1, 2)
            )
            found[layer] = scale * torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)
    return found


def deltas_of_module(module: SDXLModule) -> dict[str, Tensor]:
    """What the layers of peft add to their weights, by network and layer: the products, DoRA's norms apart."""
    found = {}
    for prefix, network in networks_of(module).items():
        for name, layer in updated_layers(network).items():
            key = f"{prefix}.{'text_model.' if prefix == 'text_encoder' else ''}{name}"
            if "default" in getattr(layer, "lora_magnitude_vector", {}):
                found[f"{key}.magnitude"] = layer.lora_magnitude_vector["default"].weight.flatten()
            found[key] = layer.get_delta_weight("default")
            if (initial := getattr(layer, "initial", None)) is not None:
                found[key] = found[key] - initial.b @ initial.a
    return {name: value.detach() for name, value in found.items()}


def kohya_name(name: str) -> str:
    for ours, theirs in {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}.items():
        if name.startswith(f"{ours}."):
            layer, magnitude, _ = name.removeprefix(f"{ours}.").partition(".magnitude")
            return f"{theirs}_{layer.replace('.', '_')}{magnitude}"
    raise AssertionError(name)


ALL = {name: adapter for name, adapter in ADAPTERS.items() if name != "full"} | {
    "loha": LoHa(rank=3, alpha=6.0, target_modules=LAYERS),
    "loha_ranks": LoHa(rank=2, ranks={"*.0": 4}, target_modules=LAYERS),
    "lokr": LoKr(rank=1, alpha=3.0, factor=2, target_modules=LAYERS),
    "lokr_full": LoKr(rank=50, alpha=3.0, target_modules=LAYERS),
}
FORMATS: tuple[Format, ...] = ("diffusers", "kohya", "bundled")


@pytest.mark.parametrize("texts", [False, True], ids=["unet", "unet_and_text_encoders"])
@pytest.mark.parametrize("adapter", ALL.values(), ids=ALL)
def test_every_format_holds_the_whole_update(tiny: Path, tmp_path: Path, adapter: Any, texts: bool) -> None:
    of_texts = replace(adapter, target_modules=None) if texts else None
    module = trained_module(tiny, adapter, text_encoder_adapter=of_texts)
    embeddings = module.conditioner.new_embeddings()
    exported = export(networks_of(module), tmp_path, "x", embeddings, module.placeholders.counts, FORMATS)
    networks = ("unet", "text_encoder", "text_encoder_2") if texts else ("unet",)
    of_lycoris = isinstance(adapter, LoHa | LoKr)
    assert (exported.lora, exported.lycoris) == (((), networks) if of_lycoris else (networks, ()))
    assert exported.others.keys() == {"x.safetensors", "x_bundled.safetensors"}
    wanted = deltas_of_module(module)
    files = {} if of_lycoris else {LORA_FILE: (deltas_of_diffusers(tmp_path / LORA_FILE), wanted)}
    bundle = load_file(tmp_path / "x_bundled.safetensors")
    for encoder, rows in embeddings.items():
        assert bundle.pop(f"bundle_emb.TOK.{encoder}").equal(rows)
    assert all(value.equal(bundle.pop(key)) for key, value in load_file(tmp_path / "x.safetensors").items())
    assert not bundle
    named = {kohya_name(name): value for name, value in wanted.items()}
    files["x.safetensors"] = deltas_of_kohya(tmp_path / "x.safetensors"), named
    for found, expected in files.values():
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name].reshape(value.shape), value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("adapter", ALL.values(), ids=ALL)
def test_a_merged_checkpoint_renders_the_same_picture(tiny: Path, tmp_path: Path, adapter: Any) -> None:
    module = trained_module(tiny, adapter, text_encoder_adapter=replace(adapter, target_modules=None))
    weights = weights_of(networks_of(module), module.conditioner.new_embeddings(), module.placeholders.counts)
    merged = write_merged(module.checkpoint, weights, tmp_path / "merged")
    usage = f"from diffusers import StableDiffusionXLPipeline as P\npipe = P.from_pretrained({str(merged)!r})\n"
    assert largest_difference(module, usage) < 1e-4


@pytest.mark.parametrize("texts", [False, True], ids=["unet", "unet_and_text_encoders"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "pissa", "ranks"])
def test_diffusers_renders_the_same_picture_with_kohyas_file(
    tiny: Path, tmp_path: Path, kind: str, texts: bool
) -> None:
    adapter = replace(ADAPTERS[kind], target_modules=("to_q", "to_k", "to_v", "to_out.0"))
    of_texts = replace(adapter, target_modules=None) if texts else None
    module = trained_module(tiny, adapter, text_encoder_adapter=of_texts)
    embeddings = module.conditioner.new_embeddings()
    exported = export(networks_of(module), tmp_path, "x", embeddings, module.placeholders.counts, ("kohya",))
    assert exported == Exported((), exported.lycoris, (), "x.safetensors", exported.others)
    files = replace(described(module, tmp_path / "other"), folder=tmp_path)
    usage = files.usage().replace(LORA_FILE, "x.safetensors")
    assert largest_difference(module, usage) < 1e-4


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(tiny: Path, tmp_path: Path, precision: Any) -> None:
    module = trained_module(tiny, text_encoder_adapter=FullFinetune())
    embeddings = module.conditioner.new_embeddings()
    export(networks_of(module), tmp_path, "x", embeddings, {"TOK": 2}, FORMATS, precision)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for path in tmp_path.rglob("*.safetensors"):
        values = {name: value for name, value in load_file(path).items() if not name.endswith(".alpha")}
        assert {value.dtype for value in values.values()} == {dtype}, path
    assert CLIPTextModel.from_pretrained(tmp_path / "text_encoder").dtype == dtype
    for name, value in deltas_of_module(module).items():
        found = deltas_of_diffusers(tmp_path / LORA_FILE)[name].float()
        torch.testing.assert_close(found, value, atol=0.05, rtol=0.05)


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
    assert weights_of(networks_of(module)) == AdapterWeights({})


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
