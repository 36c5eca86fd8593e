from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_edm.callbacks.validation_images import empty_batch
from lit_edm.edm import guided, karras_sigmas, sample_euler
from lit_edm.modules import SDXLModule
from lit_edm.sdxl import LoRA
from lit_edm.sdxl.card import AdapterFolder, as_cell
from lit_edm.sdxl.export import LORA_FILE, lora_state_dict, save_embeddings, save_lora, write_whole

PROMPT = "a 3d icon in the style of TOK, a red apple"
SIGMAS = karras_sigmas(6, 0.03, 14.6)
SIDE, SCALE = 16, 3.0


def trained_module(base: Path, **settings: Any) -> SDXLModule:
    """A module whose trained values are far from where they start, as after training."""
    torch.manual_seed(0)
    module = SDXLModule(str(base), tokens={"TOK": 2}, adapter=LoRA(rank=3, alpha=6.0), **settings)
    module.configure_model()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3 if "lora_" in name else 1.0)
    return module.eval()


def described(module: SDXLModule, folder: Path) -> AdapterFolder:
    save_lora(module.denoiser.unet, folder)
    save_embeddings(module.conditioner.new_embeddings(), folder / "x_emb.safetensors")
    prompt = module.placeholders.replace(PROMPT)
    return AdapterFolder(
        folder, module.checkpoint, module.placeholders.tokens, module.pool_at_end, "x_emb.safetensors", [prompt], [], ""
    )


def pipeline_by(usage: str) -> StableDiffusionXLPipeline:
    """Runs the code of the model card, up to the picture, in a fresh namespace."""
    names: dict[str, Any] = {}
    exec(usage.rsplit("\n", 1)[0], names)
    return names["pipe"]


def rendered_by_module(module: SDXLModule, noise: Tensor) -> Tensor:
    batch = empty_batch(PROMPT, SIDE, module.device)
    with torch.no_grad():
        denoise = guided(module.denoise(batch), module.denoise_unconditionally(batch), SCALE)
        return module.decode(sample_euler(denoise, noise * SIGMAS[0], SIGMAS)).clamp(-1, 1) / 2 + 0.5


def rendered_by_pipeline(pipe: StableDiffusionXLPipeline, noise: Tensor) -> Tensor:
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
    ).images


def pipe_init_sigma(pipe: StableDiffusionXLPipeline) -> float:
    """The factor that the pipeline puts on given latents."""
    pipe.scheduler.set_timesteps(sigmas=SIGMAS.tolist())
    return float(pipe.scheduler.init_noise_sigma)


@pytest.mark.parametrize("pool_at_end", [True, False])
def test_a_fresh_pipeline_renders_the_same_pixels(
    tiny: Path, tmp_path: Path, pool_at_end: bool, record_property: Callable[[str, object], None]
) -> None:
    module = trained_module(tiny, pool_at_end=pool_at_end)
    files = described(module, tmp_path / "adapter")
    noise = torch.randn(1, *module.latents.shape(SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    ours = rendered_by_module(module, noise)
    theirs = rendered_by_pipeline(pipeline_by(files.usage()), noise)
    difference = (ours - theirs).abs().max().item()
    record_property("largest difference of a pixel in [0, 1]", difference)
    assert difference < 1e-4
    assert ours.std() > 0.05

    base = rendered_by_pipeline(StableDiffusionXLPipeline.from_pretrained(tiny), noise)
    assert (ours - base).abs().max() > 0.05, "the adapter would change nothing"
    without_tokens = files.usage().replace("_emb.safetensors", "_emb0.safetensors")
    zeros = {name: torch.zeros_like(rows) for name, rows in load_file(files.folder / "x_emb.safetensors").items()}
    save_embeddings(zeros, files.folder / "x_emb0.safetensors")  # type: ignore[arg-type]
    assert (ours - rendered_by_pipeline(pipeline_by(without_tokens), noise)).abs().max() > 1e-3, "nor would the tokens"


def test_lora_file_holds_the_whole_update(tiny: Path) -> None:
    unet = trained_module(tiny).denoiser.unet
    weights = lora_state_dict(unet)
    names = {name.removeprefix("unet.").rsplit(".lora_", 1)[0] for name in weights}
    assert len(weights) == 2 * len(names)
    for name in names:
        layer = unet.get_submodule(name)
        update = weights[f"unet.{name}.lora_B.weight"] @ weights[f"unet.{name}.lora_A.weight"]
        torch.testing.assert_close(update, layer.get_delta_weight("default"))  # type: ignore[operator]
    adapted = {name for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    assert names == adapted


def test_files_are_float32_and_named_as_diffusers_looks_for_them(tiny: Path, tmp_path: Path) -> None:
    module = trained_module(tiny)
    assert save_lora(module.denoiser.unet, tmp_path) == tmp_path / LORA_FILE
    assert LORA_FILE == "pytorch_lora_weights.safetensors"
    embeddings = load_file(save_embeddings(module.conditioner.new_embeddings(), tmp_path / "a_emb.safetensors"))
    assert {name: rows.shape for name, rows in embeddings.items()} == {"clip_l": (2, 32), "clip_g": (2, 48)}
    for path in tmp_path.iterdir():
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.txt"
    write_whole(path, lambda part: part.write_text("first"))

    def fail(part: Path) -> None:
        part.write_text("half of the sec")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


class TestCard:
    def test_names_base_words_pictures_and_config(self, tiny: Path, tmp_path: Path) -> None:
        module = trained_module(tiny)
        files = described(module, tmp_path / "icons")
        card = AdapterFolder(
            **{**vars(files), "prompts": ["a <s0><s1> | *x*"], "pictures": ["sample_00.png"], "config": "a: 1"}
        ).card()
        header, body = card.split("---\n")[1], card.split("---\n", 2)[2]
        import yaml

        data = yaml.safe_load(header)
        assert data["base_model"] == str(tiny)
        assert data["instance_prompt"] == "a <s0><s1> | *x*"
        assert data["widget"] == [{"text": "a <s0><s1> | *x*", "output": {"url": "sample_00.png"}}]
        assert "- write `<s0><s1>` where the captions had `TOK`" in body
        assert r"| a \<s0\>\<s1\> \| \*x\* | ![](sample_00.png) |" in body
        assert "```yaml\na: 1\n```" in body

    def test_usage_without_tokens_and_with_another_vae(self, tiny: Path, tmp_path: Path) -> None:
        module = SDXLModule(str(tiny), vae=str(tiny / "vae"))
        module.configure_model()
        save_lora(module.denoiser.unet, tmp_path)
        files = AdapterFolder(tmp_path, module.checkpoint, {}, True, "none", ["an apple"], [], "")
        assert "load_textual_inversion" not in files.usage()
        pipe = pipeline_by(files.usage())
        assert np.isfinite(pipe("an apple", num_inference_steps=1, height=16, width=16, output_type="np").images).all()

    def test_prompts_cannot_break_the_table(self) -> None:
        assert as_cell("a | b\n# c <img>") == r"a \| b \# c \<img\>"
