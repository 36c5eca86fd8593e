"""Between live networks and what an adapter adds to them: takes it from their layers, puts it on their layers."""

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_edm.errors import InputError
from lit_edm.sdxl.layers import examples, published_name
from lit_edm.sdxl.low_rank import Size, patterns, updated_layers
from lit_edm.sdxl.updates import AdapterWeights, LayerUpdate, LoHaUpdate, LoKrUpdate, LoRAUpdate, from_factors

if TYPE_CHECKING:
    from peft import PeftConfig


def weights_of(
    networks: Mapping[str, nn.Module],
    embeddings: Mapping[str, Tensor] | None = None,
    tokens: Mapping[str, int] | None = None,
) -> AdapterWeights:
    """Returns copies of what is trained of networks by adapters, on the CPU.

    Args:
        networks: UNet and text encoders by their names in a pipeline.
        embeddings: The new tokens' embeddings, clip_l (N, D1) and clip_g (N, D2).
        tokens: Number of tokens of each placeholder.
    """
    updates = {
        prefix: {published_name(network, name): update_of(layer) for name, layer in updated_layers(network).items()}
        for prefix, network in networks.items()
    }
    rows = {name: copied(value) for name, value in (embeddings or {}).items()}
    return AdapterWeights({prefix: layers for prefix, layers in updates.items() if layers}, rows, tokens or {})


def update_of(layer: Any) -> LayerUpdate:
    """Returns the update of a layer of peft; PiSSA's and OLoRA's is the difference to the start, of twice the rank."""
    scale = layer.scaling["default"]
    kinds = [kind for kind in layer.adapter_layer_names if kind.startswith(("hada_", "lokr_"))]
    factors = {kind: copied(getattr(layer, kind)["default"]) for kind in kinds if "default" in getattr(layer, kind)}
    if factors:
        return from_factors(factors, scale)
    a, b = (copied(getattr(layer, kind)["default"].weight) for kind in ("lora_A", "lora_B"))
    if (initial := getattr(layer, "initial", None)) is not None:
        a, b = torch.cat([a, copied(initial.a)]), torch.cat([scale * b, -copied(initial.b)], dim=1)
        return LoRAUpdate(a, b)
    magnitudes = layer.lora_magnitude_vector
    magnitude = copied(magnitudes["default"].weight).flatten() if "default" in magnitudes else None
    return LoRAUpdate(a, b, scale, magnitude)


def copied(tensor: Tensor) -> Tensor:
    """Returns a copy on the CPU, float32."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


@torch.no_grad()
def inject(
    weights: AdapterWeights,
    networks: Mapping[str, nn.Module],
    trainable: bool,
    name: str = "default",
    source: str = "the adapter",
) -> None:
    """Puts updates on networks by peft, which then compute base plus updates; other adapters stay on.

    Args:
        weights: What is put on.
        networks: UNet and text encoders by their names in a pipeline.
        trainable: Whether the updates are to be trained; they are float32 either way, and nothing else is touched.
        name: What peft is to call the adapter, where there are several on the same networks.
        source: Where the updates are from, for messages.

    Raises:
        InputError: A layer that the networks lack, or one of another shape; nothing has been put on then.
    """
    plans = {}
    for prefix, updates in weights.networks.items():
        if prefix not in networks:
            raise InputError(f"{source} updates {prefix}, which is not there to take it")
        plans[prefix] = fitting(updates, networks[prefix], source)
    for prefix, updates in plans.items():
        put_on(updates, networks[prefix], trainable, name)


def fitting(updates: Mapping[str, LayerUpdate], network: nn.Module, source: str) -> dict[str, LayerUpdate]:
    """Returns updates by the names of the network's own layers.

    Raises:
        InputError: The network has no such layer, or one of another shape.
    """
    layers = base_layers(network)
    for name, update in updates.items():
        if name not in layers:
            raise InputError(f"{source} updates {name}, which the base does not have: {examples(list(layers))}")
        weight = layers[name][1].weight
        wanted = len(weight), weight[0].numel()
        if update.size != wanted:
            sizes = ", but ".join(f"{rows} x {columns}" for rows, columns in (update.size, wanted))
            raise InputError(f"{source} is for another base: its update of {name} is {sizes} in this one")
    return {layers[name][0]: update for name, update in updates.items()}


def base_layers(network: nn.Module) -> dict[str, tuple[str, Any]]:
    """Returns all linear layers and convolutions by published name, each with its own name."""
    inside = re.compile(r"\.base_layer(?=\.|$)")  # where peft has put updates around a layer
    return {
        published_name(network, own): (own, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and ".lora_" not in f".{name}"
        for own in [inside.sub("", name)]
    }


def put_on(updates: Mapping[str, LayerUpdate], network: nn.Module, trainable: bool, name: str) -> None:
    """Has peft wrap the layers, kind by kind, and gives the wrappers their values."""
    from peft import inject_adapter_in_model

    trained = {id(parameter): parameter.requires_grad for parameter in network.parameters()}
    for config, group in configs(updates):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # which is what is wanted
            inject_adapter_in_model(config, network, adapter_name=name)
        for layer, update in group.items():
            fill(network.get_submodule(layer), update, name)
    for layer in updated_layers(network).values():
        layer.set_adapter(sorted(set().union(*(getattr(layer, kind) for kind in layer.adapter_layer_names))))
    for parameter in network.parameters():  # which peft has set as it sees fit
        parameter.requires_grad_(trained.get(id(parameter), trainable))


def configs(updates: Mapping[str, LayerUpdate]) -> Iterator[tuple["PeftConfig", dict[str, LayerUpdate]]]:
    """Yields peft's description of each kind of update, with the updates of that kind."""
    from peft import LoHaConfig, LoKrConfig

    from lit_edm.sdxl.lora_layers import lora_config

    kinds = {LoHaUpdate: LoHaConfig, LoKrUpdate: LoKrConfig}
    groups: dict[tuple[type[LayerUpdate], bool], dict[str, LayerUpdate]] = {}
    for layer, update in updates.items():
        with_magnitude = isinstance(update, LoRAUpdate) and update.magnitude is not None
        groups.setdefault((type(update), with_magnitude), {})[layer] = update
    for (kind, with_magnitude), group in groups.items():
        sizes = {layer: Size(update.rank, update.scale * update.rank) for layer, update in group.items()}
        if kind is LoRAUpdate:
            yield lora_config(sizes, use_dora=with_magnitude), group
        else:
            yield kinds[kind](**patterns(sizes)), group


def fill(layer: Any, update: LayerUpdate, name: str) -> None:
    """Gives a wrapped layer the values of an update, float32, in place of those that peft has made up."""
    device = layer.get_base_layer().weight.device
    if isinstance(update, LoRAUpdate):
        values = [(layer.lora_A[name].weight, update.a), (layer.lora_B[name].weight, update.b)]
        if update.magnitude is not None:
            values.append((layer.lora_magnitude_vector[name].weight, update.magnitude))
        for parameter, value in values:
            parameter.data = value.to(device, torch.float32, copy=True).reshape(parameter.shape)
        return
    for kind in layer.adapter_layer_names:  # which of LoKr's are full may differ from what peft would choose
        if name in (factors := getattr(layer, kind)):
            del factors[name]
    for kind, value in update.factors().items():
        getattr(layer, kind)[name] = nn.Parameter(value.to(device, torch.float32, copy=True))
