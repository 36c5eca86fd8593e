"""Class images that the base renders before training."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lit_edm.batch import ClassImageRequest
from lit_edm.data.buckets import Size
from lit_edm.data.images import ImageFile
from lit_edm.data.items import Item
from lit_edm.data.team import Team
from lit_edm.errors import InputError
from lit_edm.files import write_whole
from lit_edm.seeds import run_seed, seed_of

RENDERED_AT_ONCE = 4
"""Class images in a batch."""

TOLD_IN = "lit_edm"
"""Text chunk of a PNG in which stands, as JSON, what it was rendered from."""


@dataclass(frozen=True)
class RenderedImage(ImageFile):
    """An image file that the base writes before training, unless it is there.

    Args:
        rendered: Height and width in pixels.
        number: What its noise follows from, together with the run's seed.
    """

    rendered: Size
    number: int

    def size(self) -> Size:
        """Returns the height and width that it has or will have."""
        return self.rendered

    def check(self) -> None:
        """Accepts what is not there yet."""

    def request(self, prompt: str) -> ClassImageRequest:
        """Returns what the base is asked to render."""
        return {"prompt": prompt, "size": self.rendered, "seed": seed_of(run_seed(), self.number)}

    def write(self, pixels: Tensor, request: ClassImageRequest) -> None:
        """Writes what was rendered, pixels (3, H, W), about [-1, 1], and what it was rendered from.

        Raises:
            InputError: Pixels are not finite.
        """
        if not pixels.isfinite().all():
            raise InputError(
                f"the class image of {request['prompt']!r} has pixels that are not finite, most often because SDXL's "
                "own VAE overflows in half precision: set model.init_args.vae to madebyollin/sdxl-vae-fp16-fix, or "
                "trainer.precision to bf16-mixed"
            )
        info = PngInfo()
        info.add_text(TOLD_IN, json.dumps(request))
        levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        image = Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
        write_whole(self.path, lambda part: image.save(part, format="PNG", pnginfo=info))


def render_missing(items: Sequence[Item], render: Callable[[list[ClassImageRequest]], Tensor], team: Team) -> None:
    """Has the images rendered that are asked for and not there.

    Args:
        items: Some of which are images to render, all of one size.
        render: Returns pixels (B, 3, H, W) in [-1, 1] of requests.
        team: The processes that share the work.

    Raises:
        InputError: What another process rendered cannot be seen.
    """
    # All that was not there in setup, for which processes wait: some of it may be by the time that the last comes here.
    wanted = {item.image: item.caption for item in items if isinstance(item.image, RenderedImage)}
    images = list(wanted)
    batches = [images[start : start + RENDERED_AT_ONCE] for start in range(0, len(images), RENDERED_AT_ONCE)]
    for batch in team.share(batches, "Rendering class images"):
        if lacking := [image for image in batch if not image.path.exists()]:
            requests = [image.request(wanted[image]) for image in lacking]
            for image, request, pixels in zip(lacking, requests, render(requests), strict=True):
                image.write(pixels, request)
    if unseen := next((image.path for image in wanted if not image.path.exists()), None):
        raise InputError(f"{unseen} is not there on every machine: put the prior's root where all can see it")


def check_rendered(image: ImageFile, prompt: str, size: Size) -> None:
    """Raises InputError if an image says of itself that it was rendered of another prompt or in another size."""
    with image.opened() as opened:
        told = opened.info.get(TOLD_IN)
    if told is None:  # of the user's own
        return
    rendered, wanted = read_told(told), {"prompt": prompt, "size": list(size)}
    for key, value in wanted.items():
        if rendered.get(key) != value:
            raise InputError(
                f"{image.name} was rendered with {key} {rendered.get(key)!r}, but the prior now asks for {value!r}: "
                "delete it and its like, or name another folder as the prior's root"
            )


def read_told(told: object) -> dict[str, Any]:
    """Returns what an image says that it was rendered from; empty if that cannot be understood."""
    try:
        rendered = json.loads(str(told))
    except (ValueError, RecursionError):
        return {}
    return rendered if isinstance(rendered, dict) else {}
