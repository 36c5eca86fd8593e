"""What a PNG says of how it was rendered."""

import json
from collections.abc import Mapping
from typing import Any

from PIL.PngImagePlugin import PngInfo

import lit_edm
from lit_edm.batch import PictureRequest


def picture_info(request: PictureRequest, settings: Mapping[str, Any]) -> PngInfo:
    """Returns a PNG's metadata: parameters, as A1111 writes and many programs read them, and lit_edm, all as JSON.

    Args:
        request: What was asked for.
        settings: Of the module, as its picture_settings gives them.
    """
    info = PngInfo()
    info.add_text("parameters", parameters(request, settings))
    info.add_text("lit_edm", json.dumps({**request, **settings, "version": lit_edm.__version__}))
    return info


def parameters(request: PictureRequest, settings: Mapping[str, Any]) -> str:
    """Returns prompt, negative prompt and a line of settings, as A1111 writes them."""
    height, width = request["size"]
    values = {
        "Steps": settings["steps"],
        "Sampler": settings["sampler"],
        "CFG scale": settings["guidance_scale"],
        "Seed": request["seed"],
        "Size": f"{width}x{height}",
        "Model": settings["pretrained"],
        "Adapters": " ".join(f"{file['path']}:{file['scale'] * request['scale']:g}" for file in settings["adapters"]),
        "Guidance interval": settings["guidance_interval"],
        "Version": f"lit_edm {lit_edm.__version__}",
    }
    lines = [request["prompt"]]
    if settings["negative_prompt"] is not None:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{name}: {quoted(value)}" for name, value in values.items() if value not in ("", None)))
    return "\n".join(lines)


def quoted(value: object) -> str:
    """Returns a value's text, in quotation marks where it would be taken for several."""
    text = str(value)
    return json.dumps(text) if any(mark in text for mark in ",:\n") else text
