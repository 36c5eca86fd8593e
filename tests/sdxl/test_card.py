"""The model card, read as the Hub reads it: its header by huggingface_hub, its text by a parser of Markdown."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from lit_edm.modules import SDXLModule
from lit_edm.sdxl import Adapter, FullFinetune, LoRA, SDXLCheckpoint
from lit_edm.sdxl.card import AdapterFolder
from lit_edm.sdxl.export import LORA_FILE, Exported, export
from lit_edm.sdxl.hub import HubRepository

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
PLAYGROUND = "playgroundai/playground-v2.5-1024px-aesthetic"
LORA = Exported(("unet",), (), (), "x_lycoris.safetensors")
LYCORIS = Exported((), ("unet",), (), "x_lycoris.safetensors")
TOKENS = {"TOK": ["<s0>", "<s1>"]}


def described(base: str = SDXL, exported: Exported = LORA, **settings: Any) -> AdapterFolder:
    """A folder that is not there: a card is made of words alone."""
    defaults: dict[str, Any] = {
        "folder": Path("runs/icons/adapter"),
        "checkpoint": SDXLCheckpoint(base),
        "exported": exported,
        "tokens": TOKENS,
        "pool_at_end": True,
        "clip_skip": 0,
        "embeddings": "x_emb.safetensors",
        "prompts": ["a <s0><s1> | *x*"],
        "pictures": ["sample_00.png"],
        "config": "a: 1\n",
    }
    return AdapterFolder(**(defaults | settings))


def parsed(card: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text)


def blocks(card: str, language: str) -> list[str]:
    return [token.content for token in parsed(card) if token.type == "fence" and token.info == language]


def headings(card: str) -> list[str]:
    tokens = parsed(card)
    after = [tokens[i + 1].children or [] for i, token in enumerate(tokens) if token.type == "heading_open"]
    return ["".join(child.content for child in children) for children in after]


def rows(card: str) -> dict[str, str]:
    """First and second column of all tables, as they are shown."""
    tokens = parsed(card)
    cells = [tokens[i + 1].children or [] for i, token in enumerate(tokens) if token.type == "td_open"]
    shown = ["".join(child.content for child in children) for children in cells]
    return dict(zip(shown[::2], shown[1::2], strict=True))


def test_the_header_tells_the_hub_what_it_is() -> None:
    assert ModelCard(described().card()).data.to_dict() == {
        "base_model": SDXL,
        "license": "openrail++",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": "a <s0><s1> | *x*",
        "tags": ["text-to-image", "diffusers", "stable-diffusion-xl", "lit_edm", "lora", "template:sd-lora"],
        "widget": [{"text": "a <s0><s1> | *x*", "output": {"url": "sample_00.png"}}],
    }


def test_the_text_has_all_one_asks_for() -> None:
    card = described(title="icons3d", settings={"UNet": "LoRA(rank=8)", "new tokens": "TOK = <s0><s1>"}).card()
    sections = ["Trigger words", "Samples", "Files", "Use", "How it was trained", "Licence"]
    assert headings(card) == ["icons3d", *sections]
    assert f"LoRA (unet), new tokens for `{SDXL}`" in card
    assert "- write `<s0><s1>` where the captions had `TOK`" in card
    assert r"| a \<s0\>\<s1\> \| \*x\* | ![](sample_00.png) |" in card
    assert rows(card).keys() == {
        *("a <s0><s1> | *x*", LORA_FILE, "x_emb.safetensors", "config.yaml", "UNet", "new tokens"),
    }
    assert rows(card)["UNet"] == "LoRA(rank=8)"
    assert blocks(card, "python") == [f"{described().usage()}\n"]
    assert blocks(card, "bash") == ["lit-edm fit --config config.yaml\n"]
    assert blocks(card, "yaml") == ["a: 1\n"]


def test_says_nothing_of_what_is_not_there() -> None:
    card = described(tokens={}, prompts=[], pictures=[], config="").card()
    assert headings(card) == ["adapter", "Files", "Use", "Licence"]
    assert rows(card).keys() == {LORA_FILE}
    assert "instance_prompt" not in ModelCard(card).data.to_dict()


def test_says_which_programs_read_lycoris() -> None:
    card = described(exported=replace(LYCORIS, others={"x_bundled.safetensors": "Forge"})).card()
    assert "`x_lycoris.safetensors` has the layout of kohya's scripts and LyCORIS. ComfyUI" in card
    assert not blocks(card, "python")
    read_by = rows(card)
    assert read_by["x_lycoris.safetensors"] == "ComfyUI, Forge and AUTOMATIC1111, from their folder of LoRAs"
    assert read_by["x_emb.safetensors"].endswith("one writes x_emb, or embedding:x_emb in ComfyUI")
    assert read_by["x_bundled.safetensors"] == "Forge"
    assert {"lora"} == {"lora", "template:sd-lora"} & {*ModelCard(card).data.to_dict()["tags"]}


def test_names_what_each_network_has() -> None:
    exported = Exported(("unet",), (), ("text_encoder", "text_encoder_2"), "x_lycoris.safetensors")
    card = described(exported=exported, tokens={}).card()
    assert f"LoRA (unet), weights (text_encoder, text_encoder_2) for `{SDXL}`" in card
    assert rows(card)["text_encoder/"] == "CLIPTextModel of transformers"


@pytest.mark.parametrize(
    ("base", "given", "header", "text"),
    [
        (SDXL, None, ("openrail++", None, None), r"\[openrail\+\+\]\(https://\S+/LICENSE.md\), as the base\."),
        (
            PLAYGROUND,
            None,
            ("other", "playground-v2dot5-community", f"https://huggingface.co/{PLAYGROUND}/blob/main/LICENSE.md"),
            r"\[playground-v2dot5-community\]\(https://\S+/LICENSE.md\), as the base\.",
        ),
        (SDXL, "cc-by-4.0", ("cc-by-4.0", None, None), r"cc-by-4\.0\."),
        ("someone/else", None, (None, None, None), r"Not stated\. The licence of `someone/else` binds"),
    ],
)
def test_licence(base: str, given: str | None, header: tuple[str | None, ...], text: str) -> None:
    card = described(base, licence=given).card()
    data = ModelCard(card).data.to_dict()
    assert tuple(data.get(key) for key in ("license", "license_name", "license_link")) == header
    assert re.search(rf"## Licence\n\n{text}", card)


def test_a_base_in_a_folder_is_no_model_of_the_hub(tmp_path: Path) -> None:
    card = described(str(tmp_path)).card()
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert f"for `{tmp_path}`" in card


@pytest.mark.parametrize(
    "text",
    [
        "a | b\n# c <img src=x onerror=alert(1)>",
        "```\n---\n# mine\n```\n",
        "---\nlicense: mit\n---\n",
        "`a` ``b`` ```c```",
        "'\"; import os #\\",
        "</td></table><script>x</script>",
        "[x](http://y.z) ![](z.png) &lt;",
        "é\u2028\x1b\U0001f600 - x: {y}",
    ],
)
def test_no_words_break_out(text: str) -> None:
    """Of prompts, names, settings and configs: sections, header and code are what they are with harmless words."""
    files = described(
        title=text,
        tokens={text: TOKENS["TOK"]},
        prompts=[text],
        config=f"a: |\n  {text}\n{text}",
        embeddings=f"{text}_emb.safetensors",
        settings={"loss": text},
    )
    card = files.card()
    harmless = described(settings={"loss": "EDMLoss()"}).card()
    assert headings(card)[1:] == headings(harmless)[1:]
    assert [token.type for token in parsed(card)] == [token.type for token in parsed(harmless)]
    inline = [child.type for token in parsed(card) for child in token.children or ()]
    assert (inline.count("image"), inline.count("link_open"), inline.count("html_inline")) == (1, 1, 0)
    data = ModelCard(card).data.to_dict()
    assert data.keys() == ModelCard(harmless).data.to_dict().keys()
    assert (data["instance_prompt"], data["license"]) == (text, "openrail++")
    assert data["widget"][0]["text"] == text
    shown = " ".join(text.split()).replace("\x1b", "\ufffd")
    assert headings(card)[0] == shown
    assert rows(card)["loss"] == shown
    assert blocks(card, "python") == [f"{files.usage()}\n"]
    compile(files.usage(), "card", "exec")


def written(tiny: Path, folder: Path, adapter: Adapter | None, **settings: Any) -> AdapterFolder:
    torch.manual_seed(0)
    module = SDXLModule(str(tiny), adapter=adapter, **settings)
    module.configure_model()
    for parameter in (parameter for parameter in module.parameters() if parameter.requires_grad):
        parameter.data += 0.1 * torch.randn_like(parameter)
    first, second = module.conditioner.encoders
    networks = {"unet": module.denoiser.unet, "text_encoder": first, "text_encoder_2": second}
    exported = export(networks, folder, "x", module.conditioner.new_embeddings(), module.placeholders.counts)
    tokens = module.placeholders.tokens
    return described(str(tiny), exported, folder=folder, tokens=tokens, checkpoint=module.checkpoint)


def pixels_by(code: str) -> torch.Tensor:
    """Runs code of a card up to the picture, and renders a small one with what it leaves."""
    names: dict[str, Any] = {}
    exec(code.rsplit("\n", 1)[0], names)
    pipe: StableDiffusionXLPipeline = names["pipe"]
    settings: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
    return pipe("a <s0><s1>", generator=torch.Generator().manual_seed(0), **settings).images


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": LoRA(rank=2), "tokens": {"TOK": 2}},
        {"adapter": FullFinetune(("mid_block",)), "text_encoder_adapter": FullFinetune(("*.0",))},
        {"adapter": None, "text_encoder_adapter": LoRA(rank=2), "tokens": {"TOK": 1}},
    ],
    ids=["lora_and_tokens", "whole_networks", "text_encoders"],
)
def test_code_that_loads_from_the_hub_renders_what_the_folder_does(
    tiny: Path, tmp_path: Path, hub: Any, settings: dict[str, Any]
) -> None:
    files = written(tiny, tmp_path / "adapter", **settings)
    from_folder = pixels_by(files.usage())
    HubRepository("someone/icons").upload(files.folder)
    usage = replace(files, repository="someone/icons").usage()
    assert str(files.folder) not in usage
    assert pixels_by(usage).equal(from_folder)
    bare = f"pipe = StableDiffusionXLPipeline.from_pretrained({str(tiny)!r})\nlast"
    assert not pixels_by(f"from diffusers import StableDiffusionXLPipeline\n{bare}").allclose(from_folder, atol=1e-3)


def test_code_without_tokens_and_with_another_vae(tiny: Path, tmp_path: Path) -> None:
    files = written(tiny, tmp_path, LoRA(rank=2), vae=str(tiny / "vae"))
    assert "load_textual_inversion" not in files.usage()
    assert pixels_by(files.usage()).isfinite().all()
