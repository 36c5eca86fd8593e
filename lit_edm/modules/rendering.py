"""What SDXL's networks render: for validation, for prior preservation, and for `lit-edm predict`."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_edm.batch import Batch, ClassImageRequest, PictureRequest
from lit_edm.edm import DPMSolverSampler, EDMPreconditioning, Sampler
from lit_edm.errors import InputError
from lit_edm.modules.diffusion import DiffusionModule, evaluating
from lit_edm.modules.generation import Files, Generation, samples_alone
from lit_edm.modules.prior import blank_batch, unit_noise
from lit_edm.sdxl import (
    Adapter,
    Conditioning,
    LatentSpace,
    Placeholders,
    SDXLCheckpoint,
    SDXLConditioner,
    SDXLDenoiser,
)
from lit_edm.sdxl.adapters import FullFinetune
from lit_edm.sdxl.guidance import guided_at_once
from lit_edm.sdxl.placement import at_hand
from lit_edm.sdxl.quantized import Quantization
from lit_edm.sdxl.schedulers import for_base


class SDXLRenderer(DiffusionModule):
    """The networks of SDXL, trained or not, and the pictures that they draw. Whoever extends it makes the networks."""

    checkpoint: SDXLCheckpoint
    placeholders: Placeholders
    pool_at_end: bool
    clip_skip: int
    adapter: Adapter | None
    text_encoder_adapter: Adapter | None
    quantization: Quantization | None
    text_encoder_quantization: Quantization | None
    latents: LatentSpace
    conditioner: SDXLConditioner
    denoiser: SDXLDenoiser
    generation: Generation
    files: Files
    fresh: bool

    @torch.no_grad()
    def sample(
        self,
        batch: Batch,
        noise: Tensor,
        sampler: Sampler,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        negative_prompt: str | None = None,
    ) -> Tensor:
        """Samples images over the noise levels that the base knows.

        Args:
            batch: Captions and sizes of the images.
            noise: What to start from, of unit variance, (B, C, H / 8, W / 8).
            sampler: Follows the noise levels down.
            guidance_scale: Strength of classifier-free guidance; 1 is none.
            guidance_interval: Noise levels between which there is guidance; all if not given.
            generator: Source of noise that the sampler adds on the way, if it adds any; DiffusersSampler takes one an
                image, too.
            negative_prompt: What guidance leads away from; what the base was trained with in its place if not given.

        Returns:
            Pixels (B, 3, H, W), about [-1, 1].
        """
        with evaluating(self):
            with at_hand(self.conditioner.encoders, noise.device):  # once for both texts, where they are away
                given = self.conditioner(batch["caption"], self.time_ids(batch))
                negative = given if guidance_scale == 1 else self.negative(given, negative_prompt)
            denoise = partial(self.denoiser, conditioning=given)
            if guidance_scale != 1:
                interval = guidance_interval or ()
                denoise = guided_at_once(self.denoiser, given, negative, guidance_scale, *interval)
            sampler = for_base(sampler, self.checkpoint)
            return self.decode(sampler(denoise, noise, *self.sigma_range, generator))  # type: ignore[arg-type]

    def negative(self, given: Conditioning, prompt: str | None) -> Conditioning:
        """Returns what guidance leads away from, with the sizes of what is given: a prompt, or no caption."""
        if prompt is None and self.conditioner.zeros_for_empty_prompt:
            return given.zeros()
        return self.conditioner([prompt or ""] * len(given.time_ids), given.time_ids)

    def on_predict_start(self) -> None:
        """Puts what was read from files on the networks: after a checkpoint is loaded, which knows nothing of it."""
        if self.fresh and self.placeholders.names and not self.files.embeddings and self.trainer.ckpt_path is None:
            raise InputError(
                f"model.init_args.tokens: {next(iter(self.placeholders.counts))} has no embeddings; name their file in "
                "model.init_args.generation.embeddings, an adapter that has them, or --ckpt_path"
            )
        self.files.put_on(self.networks(), self.conditioner.new_embeddings())

    def on_predict_end(self) -> None:
        """Leaves the networks' layers as they were."""
        self.files.take_off(self.networks())

    def predict_step(self, batch: list[PictureRequest], batch_idx: int) -> Tensor:
        """Renders requests of one size and scale; returns pixels (B, 3, H, W), about [-1, 1]."""
        self.files.set_scale(batch[0]["scale"])
        parts = [[request] for request in batch] if samples_alone(self.generation.chosen_sampler) else [batch]
        return torch.cat([self.render(part) for part in parts])

    def render(self, requests: Sequence[PictureRequest]) -> Tensor:
        """Renders pictures of one size at once; returns pixels (B, 3, H, W), about [-1, 1].

        All noise of a picture is drawn on the CPU from its own seed, as a pipeline of diffusers draws it.
        """
        size = requests[0]["size"]
        generators = [torch.Generator().manual_seed(request["seed"]) for request in requests]
        shape = self.latents.shape(*size)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return self.sample(
            blank_batch([request["prompt"] for request in requests], size, self.device),
            noise.to(self.device),
            self.generation.chosen_sampler,
            self.generation.guidance_scale,
            self.generation.guidance_interval,
            generators if len(generators) > 1 else generators[0],
            self.generation.negative_prompt,
        )

    def picture_settings(self) -> dict[str, Any]:
        """Returns what a picture follows from besides its request, as plain text, numbers, lists and dictionaries."""
        return {
            "pretrained": self.checkpoint.pretrained,
            "vae": self.checkpoint.vae,
            "tokens": self.placeholders.tokens,
            "pool_at_end": self.pool_at_end,
            "clip_skip": self.clip_skip,
            "quantization": self.quantization,
            "text_encoder_quantization": self.text_encoder_quantization,
            **self.generation.described(),
        }

    def render_class_images(self, requests: list[ClassImageRequest]) -> Tensor:
        """Has the untouched base draw class images of one size; returns pixels (B, 3, H, W), about [-1, 1].

        In 30 steps of DPM-Solver++(2M) with the guidance that is usual for the base: 5 for SDXL, 3 for Playground v2.5.
        """
        size = requests[0]["size"]
        batch = blank_batch([request["prompt"] for request in requests], size, self.device)
        noise = unit_noise([request["seed"] for request in requests], self.latents.shape(*size), self.device)
        guidance_scale = 3.0 if isinstance(self.denoiser.preconditioning, EDMPreconditioning) else 5.0
        adapters = self.adapter, self.text_encoder_adapter
        fresh = self.trainer.ckpt_path is None and any(isinstance(adapter, FullFinetune) for adapter in adapters)
        with nullcontext() if fresh else self.untouched(), self.trainer.precision_plugin.forward_context():
            return self.sample(batch, noise, DPMSolverSampler(30), guidance_scale)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Lets UNet and text encoders compute what those of the base do."""
        with ExitStack() as stack:
            if self.adapter is not None:
                stack.enter_context(self.adapter.disabled(self.denoiser.unet))
            stack.enter_context(self.conditioner.without_adapter())
            yield

    def networks(self) -> dict[str, nn.Module]:
        """Returns the UNet and the text encoders by their names in a pipeline."""
        first, second = self.conditioner.encoders
        return {"unet": self.denoiser.unet, "text_encoder": first, "text_encoder_2": second}

    def time_ids(self, batch: Batch) -> Tensor:
        """Concatenates original size, crop and target size, each height or top first, to SDXL's conditioning (B, 6)."""
        original_size, crop_top_left = batch["original_size"], batch["crop_top_left"]
        height, width = (torch.full_like(original_size[:, :1], side) for side in self.size_of(batch))
        return torch.cat([original_size, crop_top_left, height, width], dim=1)

    def size_of(self, batch: Batch) -> tuple[int, int]:
        """Returns the height and width of a batch's images in pixels, which moments tell too."""
        if "image" in batch:
            height, width = batch["image"].shape[-2:]
            return height, width
        height, width = batch["moments"].shape[-2:]
        return self.latents.factor * height, self.latents.factor * width

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The smallest and the largest noise level that the base knows."""
        return self.checkpoint.sigma_range()
