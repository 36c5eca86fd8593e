"""The model card beside exported files: what they are, the words that call them, and code that loads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_edm.sdxl.checkpoint import SDXLCheckpoint
from lit_edm.sdxl.export import LORA_FILE


@dataclass(frozen=True)
class AdapterFolder:
    """What a folder of exported files holds, for its card.

    Args:
        folder: Where the files are.
        checkpoint: The base they belong to.
        tokens: The new tokens of each placeholder, empty if none.
        pool_at_end: Whether they were trained with the second encoder pooled at the end of text.
        embeddings: Name of the embeddings' file.
        prompts: Prompts of the sample pictures, or what else shows how to call the adapter.
        pictures: Sample pictures in the folder, one a prompt, or none.
        config: The run's config, YAML.
    """

    folder: Path
    checkpoint: SDXLCheckpoint
    tokens: Mapping[str, Sequence[str]]
    pool_at_end: bool
    embeddings: str
    prompts: Sequence[str]
    pictures: Sequence[str]
    config: str

    def usage(self) -> str:
        """Returns Python code that renders a picture with diffusers alone."""
        arguments = [repr(self.checkpoint.pretrained)]
        arguments += [f"{k}={v!r}" for k in ("variant", "revision") if (v := getattr(self.checkpoint, k))]
        imports, lines = ["StableDiffusionXLPipeline"], []
        if self.checkpoint.vae:
            imports.insert(0, "AutoencoderKL")
            lines.append(f"vae = AutoencoderKL.from_pretrained({self.checkpoint.vae!r})")
            arguments.append("vae=vae")
        lines += [
            f"pipe = StableDiffusionXLPipeline.from_pretrained({', '.join(arguments)})",
            f"pipe.load_lora_weights({str(self.folder)!r}, weight_name={LORA_FILE!r})",
        ]
        if self.tokens:
            lines += self._load_tokens()
        lines += [
            'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
            f"image = pipe({self.prompt()!r}).images[0]",
        ]
        return "\n".join(
            [
                "import torch",
                f"from diffusers import {', '.join(imports)}",
                *(["from safetensors.torch import load_file"] if self.tokens else []),
                "",
                *lines,
            ]
        )

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

        data = ModelCardData(
            base_model=self.checkpoint.pretrained,
            library_name="diffusers",
            pipeline_tag="text-to-image",
            instance_prompt=self.prompt(),
            tags=["text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion-xl", "lit_edm"],
            widget=[
                {"text": prompt, "output": {"url": picture}}
                for prompt, picture in zip(self.prompts, self.pictures, strict=False)
            ],
        )
        sections = [
            f"# {self.folder.name}",
            f"LoRA of the UNet of `{self.checkpoint.pretrained}`, trained with lit_edm.",
        ]
        if self.tokens:
            lines = [f"- write `{''.join(names)}` where the captions had `{w}`" for w, names in self.tokens.items()]
            sections.append("\n".join(["## Trigger words\n", *lines]))
        if self.pictures:
            rows = [f"| {as_cell(p)} | ![]({name}) |" for p, name in zip(self.prompts, self.pictures, strict=True)]
            sections.append("\n".join(["## Samples\n", "| prompt | picture |", "| --- | --- |", *rows]))
        sections.append(f"## Use with diffusers\n\n```python\n{self.usage()}\n```")
        if self.config:
            sections.append(f"## How it was trained\n\n```yaml\n{self.config.rstrip()}\n```")
        return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def as_cell(text: str) -> str:
    """Escapes a prompt for a cell of a Markdown table."""
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
