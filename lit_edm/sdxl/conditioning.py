"""From captions and sizes to what the SDXL UNet is conditioned on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_edm.sdxl.checkpoint import SDXLCheckpoint
from lit_edm.sdxl.tokens import ExtendedEmbedding, Placeholders, add_tokens


class Conditioning(NamedTuple):
    """Inputs of the UNet besides latents and noise level."""

    context: Tensor
    """Penultimate hidden states of both encoders, shape (B, L, 2048), L = 77."""
    pooled: Tensor
    """Projected embedding of the second encoder at the end of text, shape (B, 1280)."""
    time_ids: Tensor
    """Original size, crop and target size in pixels, shape (B, 6), float32: bf16 would turn 1023 into 1024."""

    def zeros(self) -> "Conditioning":
        """Returns the conditioning that SDXL is guided away from: no words, the same sizes."""
        return Conditioning(torch.zeros_like(self.context), torch.zeros_like(self.pooled), self.time_ids)


class SDXLConditioner(nn.Module):
    """Encodes captions with both CLIP text encoders, exactly as StableDiffusionXLPipeline.encode_prompt does.

    Args:
        checkpoint: Where the tokenizers and the text encoders are.
        placeholders: New tokens whose embeddings are trained; nothing else here is.
        initializers: Words that the tokens of a placeholder start from.
        pool_at_end: Pool at the end of text. SDXL's config makes CLIP pool at the largest id instead, which is the end
            of text only as long as there are no new tokens.
        dtype: Precision of the frozen weights.
    """

    def __init__(
        self,
        checkpoint: SDXLCheckpoint,
        placeholders: Placeholders,
        initializers: Mapping[str, str],
        pool_at_end: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.placeholders = placeholders
        self.tokenizers = checkpoint.load_tokenizers()
        encoders = checkpoint.load_text_encoders(dtype)
        self.encoders = nn.ModuleList(encoders)
        self.zeros_for_empty_prompt = checkpoint.zeros_for_empty_prompt()
        if placeholders.names:
            for tokenizer, encoder in zip(self.tokenizers, encoders, strict=True):
                add_tokens(tokenizer, encoder, placeholders, initializers)
        if pool_at_end:
            pool_at_end_of_text(self.encoders[1], self.tokenizers[1])

    def forward(self, captions: Sequence[str], time_ids: Tensor) -> Conditioning:
        """Encodes captions (placeholders are replaced here) and sizes (B, 6)."""
        outputs = [self.encode(index, captions) for index in range(len(self.tokenizers))]
        context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Conditioning(context, outputs[-1].text_embeds, time_ids.float())

    def unconditional(self, time_ids: Tensor) -> Conditioning:
        """Returns what classifier-free guidance contrasts with at these sizes (B, 6)."""
        empty = self([""] * len(time_ids), time_ids)
        return empty.zeros() if self.zeros_for_empty_prompt else empty

    def too_long(self, captions: Sequence[str]) -> list[str]:
        """Returns the captions of which the encoders read only the beginning: 75 tokens between the two marks."""
        tokenizer = self.tokenizers[0]
        texts = [self.placeholders.replace(caption) for caption in captions]
        lengths = [len(ids) for ids in tokenizer(texts).input_ids]
        pairs = zip(captions, lengths, strict=True)
        return [caption for caption, length in pairs if length > tokenizer.model_max_length]

    def encode(self, index: int, captions: Sequence[str]) -> Any:
        """Runs one of the two encoders; returns the output of transformers' CLIP with all hidden states."""
        tokenizer: Any = self.tokenizers[index]
        encoder: Any = self.encoders[index]
        texts = [self.placeholders.replace(caption) for caption in captions]
        ids = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        return encoder(ids.to(encoder.device, non_blocking=True), output_hidden_states=True)

    def new_embeddings(self) -> dict[str, nn.Parameter]:
        """Returns the new rows (N, D) of each encoder under the names that embedding files give them, empty if none."""
        tables = (module for module in self.modules() if isinstance(module, ExtendedEmbedding))
        return {name: table.rows for name, table in zip(("clip_l", "clip_g"), tables, strict=False)}


def pool_at_end_of_text(encoder: Any, tokenizer: Any) -> None:
    """Makes a CLIPTextModelWithProjection pool at the first end-of-text token, also when ids above it exist."""
    encoder.config.eos_token_id = encoder.text_model.eos_token_id = tokenizer.eos_token_id
