"""Prior preservation: what the untouched base says and draws of a class."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lit_edm.batch import Batch
from lit_edm.edm import Denoise, Target


def teacher_target(denoise: Denoise, rows: Tensor, untouched: Callable[[], AbstractContextManager[None]]) -> Target:
    """Returns the target that is y in most rows of a batch, and a teacher's prediction in some.

    Args:
        denoise: D(x; sigma) of those rows alone.
        rows: Which they are, (R,), int64, on the device.
        untouched: Opens the context in which denoise is the teacher's.
    """

    @torch.no_grad()
    def target(x: Tensor, sigma: Tensor, clean: Tensor) -> Tensor:
        with untouched():
            return clean.index_copy(0, rows, denoise(x[rows], sigma[rows]))

    return target


def blank_batch(captions: Sequence[str], size: tuple[int, int], device: torch.device) -> Batch:
    """Returns a batch that asks for uncropped images of a size, height and width in pixels."""
    image = torch.zeros((), device=device).expand(len(captions), 3, *size)  # of no size in memory
    sizes = torch.tensor(size, device=device).expand(len(captions), 2)
    return Batch(image=image, caption=list(captions), original_size=sizes, crop_top_left=torch.zeros_like(sizes))


def unit_noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns unit noise (B, *shape), drawn on the CPU, each a function of its seed alone."""
    seeded = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.randn(shape, generator=generator) for generator in seeded]).to(device)
