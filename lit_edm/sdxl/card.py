"""The model card beside exported files: what they are, the words that call them, and code that loads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_edm.sdxl.checkpoint import SDXLCheckpoint
from lit_edm.sdxl.export import LORA_FILE, Exported

CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}
"""Library and class of the networks of a pipeline."""


@dataclass(frozen=True)
class AdapterFolder:
    """What a folder of exported files holds, for its card.

    Args:
        folder: Where the files are.
        checkpoint: The base they belong to.
        exported: What was trained of which network.
        tokens: The new tokens of each placeholder, empty if none.
        pool_at_end: Whether they were trained with the second encoder pooled at the end of text.
        clip_skip: Hidden layers of the text encoders that were skipped.
        embeddings: Name of the embeddings' file.
        prompts: Prompts of the sample pictures, or what else shows how to call the adapter.
        pictures: Sample pictures in the folder, one a prompt, or none.
        config: The run's config, YAML.
    """

    folder: Path
    checkpoint: SDXLCheckpoint
    exported: Exported
    tokens: Mapping[str, Sequence[str]]
    pool_at_end: bool
    clip_skip: int
    embeddings: str
    prompts: Sequence[str]
    pictures: Sequence[str]
    config: str

    def how_to_use(self) -> str:
        """Returns words on what reads the files and, where diffusers does, code that renders a picture; Markdown."""
        if not self.exported.lycoris:
            return f"With diffusers:\n\n```python\n{self.usage()}\n```"
        words = (
            f"`{self.exported.lycoris_file}` has the layout of LyCORIS: ComfyUI, Forge and AUTOMATIC1111 read it from "
            "their folder of LoRAs, as does the package lycoris-lora. Diffusers does not."
        )
        tokens = f" `{self.embeddings}` has the new tokens, `clip_l` and `clip_g`." if self.tokens else ""
        return words + tokens

    def usage(self) -> str:
        """Returns Python code that renders a picture with diffusers alone, LyCORIS' files left out."""
        lines, arguments = self._networks()
        lines.append(f"pipe = StableDiffusionXLPipeline.from_pretrained({', '.join(arguments)})")
        if self.exported.lora:
            lines.append(f"pipe.load_lora_weights({str(self.folder)!r}, weight_name={LORA_FILE!r})")
        if self.tokens:
            lines += self._load_tokens()
        skip = f", clip_skip={self.clip_skip}" if self.clip_skip else ""
        lines += [
            'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
            f"image = pipe({self.prompt()!r}{skip}).images[0]",
        ]
        return "\n".join(["import torch", *self._imports(), "", *lines])

    def _imports(self) -> list[str]:
        names = {"diffusers": ["StableDiffusionXLPipeline"], "transformers": []}
        if self.checkpoint.vae:
            names["diffusers"].append("AutoencoderKL")
        for network in self.exported.whole:
            library, name = CLASSES[network]
            names[library].append(name)
        names["safetensors.torch"] = ["load_file"] if self.tokens else []
        return [f"from {library} import {', '.join(sorted(some))}" for library, some in sorted(names.items()) if some]

    def _networks(self) -> tuple[list[str], list[str]]:
        lines = []
        arguments = [repr(self.checkpoint.pretrained)]
        arguments += [f"{k}={v!r}" for k in ("variant", "revision") if (v := getattr(self.checkpoint, k))]
        if self.checkpoint.vae:
            lines.append(f"vae = AutoencoderKL.from_pretrained({self.checkpoint.vae!r})")
            arguments.append("vae=vae")
        for network in self.exported.whole:
            source = str(self.folder / network)
            lines.append(f"{network} = {CLASSES[network][1]}.from_pretrained({source!r})")
            arguments.append(f"{network}={network}")
        return lines, arguments

    def _load_tokens(self) -> list[str]:
        load = "pipe.load_textual_inversion(embeddings[{!r}], token=tokens, text_encoder=pipe.{}, tokenizer=pipe.{})"
        lines = [
            f"embeddings = load_file({str(self.folder / self.embeddings)!r})",
            f"tokens = {[name for names in self.tokens.values() for name in names]!r}",
            load.format("clip_l", "text_encoder", "tokenizer"),
            load.format("clip_g", "text_encoder_2", "tokenizer_2"),
        ]
        if self.pool_at_end:
            lines += [
                "# SDXL's config makes CLIP pool at the largest token id, which now is a new token's, not the end's.",
                "pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id",
            ]
        return lines

    def prompt(self) -> str:
        """Returns the first prompt, as other programs must be given it: tokens in place of placeholders."""
        return self.prompts[0] if self.prompts else "".join(n for names in self.tokens.values() for n in names)

    def card(self) -> str:
        """Returns the model card, Markdown with the Hub's YAML header."""
        from huggingface_hub import ModelCardData

        adapters = {"lora": self.exported.lora, "lycoris": self.exported.lycoris}
        data = ModelCardData(
            base_model=self.checkpoint.pretrained,
            library_name="diffusers",
            pipeline_tag="text-to-image",
            instance_prompt=self.prompt(),
            tags=[
                *("text-to-image", "diffusers", "stable-diffusion-xl", "lit_edm"),
                *(tag for tag, networks in adapters.items() if networks),
                *(["template:sd-lora"] if self.exported.lora else []),
            ],
            widget=[
                {"text": prompt, "output": {"url": picture}}
                for prompt, picture in zip(self.prompts, self.pictures, strict=False)
            ],
        )
        sections = [
            f"# {self.folder.name}",
            f"{self._contents()} for `{self.checkpoint.pretrained}`, trained with lit_edm.",
        ]
        if self.tokens:
            lines = [f"- write `{''.join(names)}` where the captions had `{w}`" for w, names in self.tokens.items()]
            sections.append("\n".join(["## Trigger words\n", *lines]))
        if self.pictures:
            rows = [f"| {as_cell(p)} | ![]({name}) |" for p, name in zip(self.prompts, self.pictures, strict=True)]
            sections.append("\n".join(["## Samples\n", "| prompt | picture |", "| --- | --- |", *rows]))
        sections.append(f"## Use\n\n{self.how_to_use()}")
        if self.config:
            sections.append(f"## How it was trained\n\n```yaml\n{self.config.rstrip()}\n```")
        return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"

    def _contents(self) -> str:
        kinds = {"LoRA": self.exported.lora, "LyCORIS": self.exported.lycoris, "weights": self.exported.whole}
        parts = [f"{kind} ({', '.join(networks)})" for kind, networks in kinds.items() if networks]
        contents = ", ".join([*parts, *(["new tokens"] if self.tokens else [])])
        return contents[:1].upper() + contents[1:]


def as_cell(text: str) -> str:
    """Escapes a prompt for a cell of a Markdown table."""
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
