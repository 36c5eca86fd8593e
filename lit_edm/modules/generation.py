"""How SDXLModule renders: what with, what is read from files, and what is checked of it before weights are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_edm.batch import PictureRequest, RequestsPictures
from lit_edm.edm import DPMSolverSampler, EulerSampler, HeunSampler, Sampler
from lit_edm.errors import InputError
from lit_edm.sdxl import DiffusersSampler, Placeholders, SDXLCheckpoint
from lit_edm.sdxl.formats import read_adapter
from lit_edm.sdxl.injection import inject
from lit_edm.sdxl.latents import vae_factor
from lit_edm.sdxl.low_rank import updated_layers
from lit_edm.sdxl.schedulers import for_base
from lit_edm.sdxl.updates import AdapterWeights

KEY = "model.init_args.generation"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter to render with.

    Args:
        path: File or folder, in any format that can be read: diffusers', kohya's or LyCORIS'.
        scale: Factor on its updates.
    """

    path: str
    scale: float = 1.0


@dataclass(frozen=True)
class Generation:
    """How pictures are rendered by `lit-edm predict`.

    Args:
        adapters: Files whose updates are added to the networks, beside what is trained.
        embeddings: Files of new tokens' embeddings (clip_l and clip_g), in the order of model.init_args.tokens; after
            those that come with adapters.
        sampler: Makes pictures of noise; HeunSampler if not given, Algorithm 1 of Karras et al. (2022) in 20 steps.
        guidance_scale: Strength of classifier-free guidance; 1 is none.
        guidance_interval: Noise levels above and up to which there is guidance, [low, high]; all if not given.
        negative_prompt: What guidance leads away from; what the base was trained with in its place if not given.

    Raises:
        InputError: There is no noise level within the guidance interval, or a negative prompt without guidance.
    """

    adapters: tuple[AdapterFile, ...] = ()
    embeddings: tuple[str, ...] = ()
    sampler: Sampler | None = None  # a default's num_steps would stay behind when YAML names another class
    guidance_scale: float = 5.0
    guidance_interval: tuple[float, float] | None = None
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise InputError(f"{KEY}.guidance_interval is {self.guidance_interval}; it must be 0 <= low < high")
        if self.guidance_scale == 1 and self.negative_prompt is not None:
            raise InputError(f"{KEY}.negative_prompt has no effect without guidance; remove it, or guidance_scale: 1")

    @property
    def chosen_sampler(self) -> Sampler:
        """The sampler that is used."""
        return self.sampler or HeunSampler()

    def described(self) -> dict[str, Any]:
        """Returns the settings as plain text, numbers, lists and dictionaries; no steps where the sampler has none."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "adapters": [asdict(file) for file in self.adapters],
            "sampler": repr(self.chosen_sampler),
            "steps": getattr(self.chosen_sampler, "num_steps", None),
        }


class Files:
    """What was read from files to render with: adapters, whose scale can be changed, and new tokens' embeddings.

    Args:
        adapters: Adapters with the files that they are from.
        embeddings: Embeddings of all new tokens, clip_l (N, D1) and clip_g (N, D2), or nothing.
    """

    def __init__(
        self, adapters: Sequence[tuple[AdapterFile, AdapterWeights]], embeddings: Mapping[str, Tensor]
    ) -> None:
        self.adapters = {f"file_{number}": adapter for number, adapter in enumerate(adapters)}
        self.embeddings = embeddings
        self._scalings: list[tuple[dict[str, float], str, float]] = []

    @torch.inference_mode(False)  # what is made in there could never be trained
    @torch.no_grad()
    def put_on(self, networks: Mapping[str, nn.Module], rows: Mapping[str, Tensor]) -> None:
        """Adds the adapters to networks, and copies the embeddings to where the networks have them.

        Args:
            networks: UNet and text encoders by their names in a pipeline.
            rows: The networks' embeddings of new tokens, clip_l (N, D1) and clip_g (N, D2).

        Raises:
            InputError: An adapter or an embedding is of another base.
        """
        for name, values in self.embeddings.items():
            if values.shape != rows[name].shape:
                raise InputError(
                    f"{KEY}.embeddings: those of {name} have {values.shape[1]} values a token, but the base's text "
                    f"encoder has {rows[name].shape[1]}: they are of another base"
                )
            rows[name].copy_(values)
        for name, (file, weights) in self.adapters.items():
            inject(weights, networks, trainable=False, name=name, source=file.path)
            layers = [layer for network in networks.values() for layer in updated_layers(network).values()]
            scalings = [layer.scaling for layer in layers if name in layer.scaling]
            self._scalings += [(scaling, name, file.scale * scaling[name]) for scaling in scalings]

    def take_off(self, networks: Mapping[str, nn.Module]) -> None:
        """Takes the adapters out of networks again, which then have the layers that they had before."""
        for network in networks.values():
            for layer_name, layer in reversed(updated_layers(network).items()):
                for name in self.adapters.keys() & layer.scaling.keys():
                    layer.delete_adapter(name)
                if not layer.scaling:
                    network.set_submodule(layer_name, layer.base_layer)  # maybe one with an adapter of another kind
        self._scalings = []

    def set_scale(self, scale: float) -> None:
        """Sets the factor on the updates of all adapters, beside their own scales."""
        for scaling, name, own in self._scalings:
            scaling[name] = scale * own


def read_files(
    generation: Generation,
    checkpoint: SDXLCheckpoint,
    placeholders: Placeholders,
    images: object,
) -> Files:
    """Reads what is rendered with from files, and checks that all settings fit each other and the base.

    Args:
        generation: The settings.
        checkpoint: The base.
        placeholders: Words for new tokens.
        images: The data module, which says what is to be rendered.

    Raises:
        InputError: They do not, or a file cannot be read.
    """
    if not isinstance(images, RequestsPictures):
        raise InputError("data has no prompts to render; write PromptsDataModule as its class_path")
    requests = images.requests()
    if isinstance(sampler := for_base(generation.chosen_sampler, checkpoint), DiffusersSampler):
        sampler.make_scheduler()
    check_sizes(requests, vae_factor(checkpoint.vae_config()))
    if not generation.adapters and (scaled := [r["scale"] for r in requests if r["scale"] != 1]):
        raise InputError(
            f"data.init_args.adapter_scales holds {scaled[0]:g}, but there is no adapter from a file that it could "
            f"apply to; name one in {KEY}.adapters, or remove the scales"
        )
    adapters = [(file, read_adapter(Path(file.path).expanduser())) for file in generation.adapters]
    apart = [read_adapter(Path(path).expanduser()).embeddings for path in generation.embeddings]
    parts = [part for part in (*(weights.embeddings for _, weights in adapters), *apart) if part]
    return Files(adapters, joined_embeddings(parts, placeholders))


def check_sizes(requests: Sequence[PictureRequest], factor: int) -> None:
    """Raises InputError if a picture does not divide into whole latents, of so many pixels a side each."""
    for request in requests:
        for side, name in zip(request["size"], ("height", "width"), strict=True):
            if side % factor:
                down = side // factor * factor
                raise InputError(
                    f"data.init_args.{name} is {side}, which is not a multiple of {factor}, the VAE's factor; "
                    f"choose {' or '.join(str(choice) for choice in (down, down + factor) if choice)}"
                )


def joined_embeddings(parts: Sequence[Mapping[str, Tensor]], placeholders: Placeholders) -> dict[str, Tensor]:
    """Returns the embeddings of all new tokens, clip_l (N, D1) and clip_g (N, D2), or nothing if there are no parts.

    Args:
        parts: Embeddings of each file, in the order of the placeholders.
        placeholders: The words that the embeddings belong to.

    Raises:
        InputError: The files have more tokens than the placeholders, or fewer, or a text encoder's are missing.
    """
    names, count = ("clip_l", "clip_g"), len(placeholders.names)
    if lacking := next((part for part in parts if part.keys() != set(names)), None):
        raise InputError(f"{KEY}.embeddings: a file holds {', '.join(lacking)} alone; it must hold clip_l and clip_g")
    if parts and (found := sum(len(part["clip_l"]) for part in parts)) != count:
        raise InputError(
            f"model.init_args.tokens asks for {count} new tokens, but {KEY}.adapters and embeddings hold {found}; "
            "write each placeholder with its number of tokens, such as tokens: {TOK: 2}, and name all of their files"
        )
    return {name: torch.cat([part[name] for part in parts]) for name in names} if parts else {}


def samples_alone(sampler: Sampler) -> bool:
    """Tells whether a sampler is given one picture at a time, because it may draw the noise of a batch from one source.

    Schedulers of diffusers take a source for each picture; Euler's method, Heun's and DPM-Solver++(2M) add no noise.
    """
    if isinstance(sampler, HeunSampler):
        return sampler.s_churn > 0
    return not isinstance(sampler, DiffusersSampler | EulerSampler | DPMSolverSampler)
