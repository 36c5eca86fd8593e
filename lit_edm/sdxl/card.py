"""The model card beside exported files: what they are, the words that call them, and code that loads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lit_edm
from lit_edm.sdxl.checkpoint import SDXLCheckpoint
from lit_edm.sdxl.export import LORA_FILE, Exported
from lit_edm.sdxl.hub import is_hub_name
from lit_edm.sdxl.licences import licence_of
from lit_edm.sdxl.markdown import as_cell, as_code, fenced, table

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
        config: The run's config, YAML, empty if the folder has none.
        title: What the card calls it; the folder's name if not given.
        repository: Where it is on the Hub, from where the card's code then loads it; the folder if not given.
        licence: Its licence, an identifier of the Hub's list; the base's if not given.
        settings: Settings of the run by what they are about.
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
    title: str = ""
    repository: str | None = None
    licence: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    def how_to_use(self) -> str:
        """Returns words on what reads the files and, where diffusers does, code that renders a picture; Markdown."""
        if not self.exported.lycoris:
            return f"With diffusers:\n\n{fenced(self.usage(), 'python')}"
        words = (
            f"{as_code(self.exported.lycoris_file)} has the layout of kohya's scripts and LyCORIS. ComfyUI, Forge and "
            "AUTOMATIC1111 read it from their folder of LoRAs, as does the package lycoris-lora. Diffusers reads no "
            "LoHa and no LoKr."
        )
        tokens = f" {as_code(self.embeddings)} has the new tokens, `clip_l` and `clip_g`." if self.tokens else ""
        return words + tokens

    def usage(self) -> str:
        """Returns Python code that renders a picture with diffusers alone, LyCORIS' files left out."""
        lines, arguments = self._networks()
        lines.append(f"pipe = StableDiffusionXLPipeline.from_pretrained({', '.join(arguments)})")
        if self.exported.lora:
            lines.append(f"pipe.load_lora_weights({self._source()!r}, weight_name={LORA_FILE!r})")
        if self.tokens:
            lines += self._load_tokens()
        skip = f", clip_skip={self.clip_skip}" if self.clip_skip else ""
        lines += [
            'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
            f"image = pipe({self.prompt()!r}{skip}).images[0]",
        ]
        return "\n".join(["import torch", *self._imports(), "", *lines])

    def _source(self) -> str:
        return self.repository or str(self.folder)

    def _imports(self) -> list[str]:
        names = {"diffusers": ["StableDiffusionXLPipeline"], "transformers": []}
        if self.checkpoint.vae:
            names["diffusers"].append("AutoencoderKL")
        for network in self.exported.whole:
            library, name = CLASSES[network]
            names[library].append(name)
        names["safetensors.torch"] = ["load_file"] if self.tokens else []
        names["huggingface_hub"] = ["hf_hub_download"] if self.tokens and self.repository else []
        return [f"from {library} import {', '.join(sorted(some))}" for library, some in sorted(names.items()) if some]

    def _networks(self) -> tuple[list[str], list[str]]:
        lines = []
        arguments = [repr(self.checkpoint.pretrained)]
        arguments += [f"{k}={v!r}" for k in ("variant", "revision") if (v := getattr(self.checkpoint, k))]
        if self.checkpoint.vae:
            lines.append(f"vae = AutoencoderKL.from_pretrained({self.checkpoint.vae!r})")
            arguments.append("vae=vae")
        for network in self.exported.whole:
            where = f"{self._source()!r}, subfolder={network!r}"
            lines.append(f"{network} = {CLASSES[network][1]}.from_pretrained({where})")
            arguments.append(f"{network}={network}")
        return lines, arguments

    def _load_tokens(self) -> list[str]:
        load = "pipe.load_textual_inversion(embeddings[{!r}], token=tokens, text_encoder=pipe.{}, tokenizer=pipe.{})"
        path = repr(str(self.folder / self.embeddings))
        if self.repository:
            path = f"hf_hub_download({self.repository!r}, {self.embeddings!r})"
        lines = [
            f"embeddings = load_file({path})",
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
        base = as_code(self.checkpoint.pretrained)
        sections = {
            "": f"{self._contents()} for {base}, trained with lit_edm {lit_edm.__version__}.",
            "Trigger words": "\n".join(
                f"- write {as_code(''.join(names))} where the captions had {as_code(word)}"
                for word, names in self.tokens.items()
            ),
            "Samples": self._samples(),
            "Files": self._files(),
            "Use": self.how_to_use(),
            "How it was trained": self._training(),
            "Licence": self._licence(),
        }
        parts = [f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text]
        return f"---\n{self._header()}\n---\n\n# {as_cell(self._title())}\n\n" + "\n\n".join(parts) + "\n"

    def files(self) -> dict[str, str]:
        """Returns what reads each file, Markdown."""
        files = {LORA_FILE: "diffusers"} if self.exported.lora else {}
        if self.exported.lycoris:
            files[self.exported.lycoris_file] = "ComfyUI, Forge and AUTOMATIC1111, from their folder of LoRAs"
        files |= self.exported.others
        if self.tokens:
            stem = self.embeddings.removesuffix(".safetensors")
            files[self.embeddings] = (
                "diffusers; ComfyUI, Forge and AUTOMATIC1111, from their folder of embeddings, where in place of the "
                f"trigger words one writes {as_code(stem)}, or {as_code(f'embedding:{stem}')} in ComfyUI"
            )
        files |= {f"{network}/": f"{CLASSES[network][1]} of {CLASSES[network][0]}" for network in self.exported.whole}
        return files | ({"config.yaml": "lit-edm"} if self.config else {})

    def _header(self) -> str:
        from huggingface_hub import ModelCardData

        licence = licence_of(self.checkpoint.pretrained, self.licence)
        data = ModelCardData(
            base_model=self.checkpoint.pretrained if is_hub_name(self.checkpoint.pretrained) else None,
            license=licence and licence.identifier,
            license_name=licence and licence.name,
            license_link=licence and licence.name and licence.link,
            library_name="diffusers",
            pipeline_tag="text-to-image",
            instance_prompt=self.prompt() or None,
            tags=[
                *("text-to-image", "diffusers", "stable-diffusion-xl", "lit_edm"),
                *(["lora"] if self.exported.lora or self.exported.lycoris else []),
                *(["template:sd-lora"] if self.exported.lora else []),
            ],
            widget=[
                {"text": prompt, "output": {"url": picture}}
                for prompt, picture in zip(self.prompts, self.pictures, strict=False)
            ],
        )
        return data.to_yaml()

    def _title(self) -> str:
        return self.title or (self.repository or self.folder.name).rpartition("/")[2]

    def _files(self) -> str:
        rows = [(as_code(name), words) for name, words in self.files().items()]
        return table(("file", "what reads it"), [[cell.replace("|", r"\|") for cell in row] for row in rows])

    def _samples(self) -> str:
        rows = [(as_cell(prompt), f"![]({name})") for prompt, name in zip(self.prompts, self.pictures, strict=False)]
        return table(("prompt", "picture"), rows) if rows else ""

    def _training(self) -> str:
        parts = []
        if self.settings:
            parts.append(table(("setting", "value"), [(as_cell(n), as_cell(v)) for n, v in self.settings.items()]))
        if self.config:
            command = fenced("lit-edm fit --config config.yaml", "bash")
            parts.append(f"To repeat the run, beside the images that the config names:\n\n{command}")
            parts.append(f"The config:\n\n{fenced(self.config, 'yaml')}")
        return "\n\n".join(parts)

    def _licence(self) -> str:
        licence = licence_of(self.checkpoint.pretrained, self.licence)
        if licence is None:
            return f"Not stated. The licence of {as_code(self.checkpoint.pretrained)} binds what is made of it."
        name = as_cell(licence.name or licence.identifier)
        return f"[{name}]({licence.link}), as the base." if licence.link else f"{name}."

    def _contents(self) -> str:
        exported = self.exported
        kinds = {"LoRA": exported.lora, "adapter in LyCORIS' layout": exported.lycoris, "weights": exported.whole}
        parts = [f"{kind} ({', '.join(networks)})" for kind, networks in kinds.items() if networks]
        contents = ", ".join([*parts, *(["new tokens"] if self.tokens else [])])
        return contents[:1].upper() + contents[1:]
