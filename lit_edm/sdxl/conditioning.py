"""From captions and sizes to what the SDXL UNet is conditioned on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_edm.cache import MemoryCache, TensorCache, fingerprint
from lit_edm.sdxl.adapters import Adapter
from lit_edm.sdxl.checkpoint import SDXLCheckpoint
from lit_edm.sdxl.placement import at_hand, place_frozen
from lit_edm.sdxl.quantized import Quantization, quantize
from lit_edm.sdxl.text_store import TextStore
from lit_edm.sdxl.tokens import ExtendedEmbedding, Placeholders, add_tokens


class Conditioning(NamedTuple):
    """Inputs of the UNet besides latents and noise level."""

    context: Tensor
    """Penultimate (without clip_skip) hidden states of both encoders, shape (B, L, 2048), L = 77."""
    pooled: Tensor
    """Projected embedding of the second encoder at the end of text, shape (B, 1280)."""
    time_ids: Tensor
    """Original size, crop and target size in pixels, shape (B, 6), float32: bf16 would turn 1023 into 1024."""

    def zeros(self) -> "Conditioning":
        """Returns the conditioning that SDXL is guided away from: no words, the same sizes."""
        return Conditioning(torch.zeros_like(self.context), torch.zeros_like(self.pooled), self.time_ids)

    def zeros_where(self, rows: Sequence[bool]) -> "Conditioning":
        """Returns the same conditioning, without words in some rows."""
        kept = torch.tensor([not row for row in rows]).to(self.context.device, non_blocking=True)[:, None]
        return Conditioning(self.context * kept[..., None], self.pooled * kept, self.time_ids)


class SDXLConditioner(nn.Module):
    """Encodes captions with both CLIP text encoders, exactly as StableDiffusionXLPipeline.encode_prompt does.

    Args:
        checkpoint: Where the tokenizers and the text encoders are.
        placeholders: New tokens whose embeddings are trained.
        initializers: Words that the tokens of a placeholder start from.
        pool_at_end: Pool at the end of text. SDXL's config makes CLIP pool at the largest id instead, which is the end
            of text only as long as there are no new tokens.
        dtype: Precision of the frozen weights.
        clip_skip: Hidden layers to skip from the penultimate one on, as diffusers counts them.
        adapter: Chooses what is trained of both encoders; nothing if not given.
        cache: Where encoded texts are kept while nothing here learns; nowhere if not given.
        quantization: How frozen weights are held; as they are if not given.
    """

    def __init__(
        self,
        checkpoint: SDXLCheckpoint,
        placeholders: Placeholders,
        initializers: Mapping[str, str],
        pool_at_end: bool = True,
        dtype: torch.dtype = torch.float32,
        clip_skip: int = 0,
        adapter: Adapter | None = None,
        cache: TensorCache | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        self.placeholders = placeholders
        self.tokenizers = checkpoint.load_tokenizers()
        encoders = checkpoint.load_text_encoders(dtype)
        self.encoders = nn.ModuleList(encoders)
        if quantization is not None:
            for encoder in encoders:
                quantize(encoder)
        self.zeros_for_empty_prompt = checkpoint.zeros_for_empty_prompt()
        self.clip_skip = clip_skip
        self.adapter = adapter
        self.learns = bool(placeholders.names) or adapter is not None
        if pool_at_end:
            pool_at_end_of_text(self.encoders[1], self.tokenizers[1])
        self._of_base = self._learned = None
        if cache is not None:
            self._of_base = TextStore(cache, fingerprint(self.encoders.state_dict(), f"{clip_skip=} {pool_at_end=}"))
        self.learning = self.learns
        if adapter is not None:
            if clip_skip + 1 < encoders[0].config.num_hidden_layers:
                adapter(encoders[0], without=without_gradient(encoders[0], clip_skip))
            adapter(encoders[1])  # all of whose layers have a part in the pooled embedding
        if placeholders.names:
            for tokenizer, encoder in zip(self.tokenizers, encoders, strict=True):
                add_tokens(tokenizer, encoder, placeholders, initializers)

    @property
    def learning(self) -> bool:
        """Whether embeddings or encoders are trained now. While not, texts are encoded without gradient, and kept."""
        return self._learning

    @learning.setter
    def learning(self, learning: bool) -> None:
        self._learning = learning
        if learning or self._of_base is None:
            self._learned = None  # what was kept is no longer what the encoders say
        elif self._learned is None:
            self._learned = TextStore(MemoryCache())

    def forward(self, captions: Sequence[str], time_ids: Tensor) -> Conditioning:
        """Encodes captions (placeholders are replaced here) and sizes (B, 6), on the device of these."""
        texts = [self.placeholders.replace(caption) for caption in captions]
        # What was learned may be on loan to an average of weights where there is no training.
        store = (self._learned if self.training else None) if self.learns else self._of_base
        encode = partial(self.encode, device=time_ids.device)
        with torch.set_grad_enabled(self.learning and torch.is_grad_enabled()):
            if self.learning or store is None:
                context, pooled = encode(texts)
            else:
                context, pooled = store.read(texts, encode, time_ids.device)
        return Conditioning(context, pooled, time_ids.float())

    @torch.no_grad()
    def untouched(self, captions: Sequence[str], time_ids: Tensor) -> Conditioning:
        """Encodes captions as the base does, whatever is trained; these hold no placeholder."""
        encode = partial(self.encode, device=time_ids.device)
        with self.without_adapter():
            if self._of_base is None:
                context, pooled = encode(captions)
            else:
                self._of_base.fill(captions, encode)
                context, pooled = self._of_base.read(captions, encode, time_ids.device)
        return Conditioning(context, pooled, time_ids.float())

    def with_dropped(self, captions: Sequence[str], time_ids: Tensor) -> Conditioning:
        """Encodes captions (B) and sizes (B, 6); an empty one, as dropout leaves it, as guidance's contrast."""
        conditioning = self(captions, time_ids)
        dropped = [not caption for caption in captions]
        return conditioning.zeros_where(dropped) if self.zeros_for_empty_prompt and any(dropped) else conditioning

    def unconditional(self, time_ids: Tensor) -> Conditioning:
        """Returns what classifier-free guidance contrasts with at these sizes (B, 6)."""
        empty = self([""] * len(time_ids), time_ids)
        return empty.zeros() if self.zeros_for_empty_prompt else empty

    def encode(self, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Runs both encoders on texts; returns context (B, L, D) and pooled embedding (B, P) on the device."""
        with at_hand(self.encoders, device):
            outputs = [self._run(index, texts, device) for index in range(len(self.tokenizers))]
        context = torch.cat([output.hidden_states[-2 - self.clip_skip] for output in outputs], dim=-1)
        return context, outputs[-1].text_embeds

    def _run(self, index: int, texts: Sequence[str], device: torch.device) -> Any:
        tokenizer: Any = self.tokenizers[index]
        encoder: Any = self.encoders[index]
        ids = tokenizer(
            list(texts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return encoder(ids.to(device, non_blocking=True), output_hidden_states=True)

    @torch.no_grad()
    def keep(self, captions: Sequence[str], device: torch.device) -> None:
        """Encodes captions ahead of training that nothing here learns from, and takes the encoders off the device.

        They come back while a text is to be encoded that was not among these.
        """
        store = self._learned if self.learns else self._of_base
        if self.learning or store is None:
            return
        texts = [self.placeholders.replace(caption) for caption in captions]
        with at_hand(self.encoders, device):
            store.fill(texts, partial(self.encode, device=device))
        place_frozen(self.encoders, "cpu")

    def missing(self, captions: Sequence[str]) -> list[str]:
        """Returns the texts that `keep` would encode at the start of a run, none while there is something to learn."""
        if self.learns or self._of_base is None:
            return []
        return self._of_base.missing([self.placeholders.replace(caption) for caption in captions])

    def take_back(self, device: torch.device) -> None:
        """Has the encoders on the device for good: they are to learn, and the backward pass needs their weights."""
        place_frozen(self.encoders, device)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Lets both encoders compute what the base's do."""
        with ExitStack() as stack:
            if self.adapter is not None:
                for encoder in self.encoders:
                    stack.enter_context(self.adapter.disabled(encoder))
            yield

    def enable_gradient_checkpointing(self) -> None:
        """Has activations recomputed in the backward pass, where there is one."""
        encoders: Any = self.encoders if self.learns else ()
        for encoder in encoders:
            former = encoder.gradient_checkpointing_enable  # transformers 5.2x gave it another name
            getattr(encoder, "activation_checkpointing_enable", former)({"use_reentrant": False})
            encoder.train()  # without which there is no checkpointing; CLIP has no dropout that it would turn on

    def too_long(self, captions: Sequence[str]) -> list[str]:
        """Returns the captions of which the encoders read only the beginning: 75 tokens between the two marks."""
        tokenizer = self.tokenizers[0]
        texts = [self.placeholders.replace(caption) for caption in captions]
        lengths = [len(ids) for ids in tokenizer(texts).input_ids]
        pairs = zip(captions, lengths, strict=True)
        return [caption for caption, length in pairs if length > tokenizer.model_max_length]

    def extended_embeddings(self) -> list[ExtendedEmbedding]:
        """Returns the table of each encoder with its new rows, none if there are no new tokens."""
        return [module for module in self.modules() if isinstance(module, ExtendedEmbedding)]

    def new_embeddings(self) -> dict[str, nn.Parameter]:
        """Returns the new rows (N, D) of each encoder under the names that embedding files give them, empty if none."""
        return {n: table.rows for n, table in zip(("clip_l", "clip_g"), self.extended_embeddings(), strict=False)}

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Returns what is trained of the encoders besides new embeddings."""
        rows = {id(parameter) for parameter in self.new_embeddings().values()}
        return [p for p in self.encoders.parameters() if p.requires_grad and id(p) not in rows]


def pool_at_end_of_text(encoder: Any, tokenizer: Any) -> None:
    """Makes a CLIPTextModelWithProjection pool at the first end-of-text token, also when ids above it exist."""
    encoder.config.eos_token_id = encoder.text_model.eos_token_id = tokenizer.eos_token_id


def without_gradient(encoder: Any, clip_skip: int) -> list[str]:
    """Returns the names of the first encoder's layers behind the hidden states that are used: they get no gradient."""
    layers = encoder.encoder.layers
    unused = [*layers[len(layers) - 1 - clip_skip :], encoder.final_layer_norm]
    return [name for name, module in encoder.named_modules() if any(module is other for other in unused)]
