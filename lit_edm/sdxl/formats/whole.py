"""Whole networks, where weights themselves have been trained: as from_pretrained reads them."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_edm.files import write_whole
from lit_edm.sdxl.formats.writing import DTYPES, Precision, write
from lit_edm.sdxl.layers import is_text_encoder, published_name
from lit_edm.sdxl.low_rank import updated_layers
from lit_edm.sdxl.tokens import ExtendedEmbedding


def trains_weights(network: nn.Module) -> bool:
    """Tells whether weights of the network itself are trained, neither updates nor embeddings of new tokens."""
    added = [*updated_layers(network).values(), *(m for m in network.modules() if isinstance(m, ExtendedEmbedding))]
    apart = {id(parameter) for module in added for parameter in module.parameters()}
    return any(parameter.requires_grad and id(parameter) not in apart for parameter in network.parameters())


def own_state(network: nn.Module) -> dict[str, Tensor]:
    """Returns the weights that the network had before new tokens were added, by the names that they had."""
    table = "embeddings.token_embedding."
    state = {name.replace(f"{table}table.", table): value for name, value in network.state_dict().items()}
    return {name: value for name, value in state.items() if not name.endswith(f"{table}rows")}


def write_network(network: Any, folder: Path, precision: Precision = "float32") -> None:
    """Writes all weights and the config of a network, without updates and new tokens, as its from_pretrained reads."""
    weights: Mapping[str, Tensor] = {published_name(network, name): value for name, value in own_state(network).items()}
    if is_text_encoder(network):
        config = deepcopy(network.config)
        config.dtype = DTYPES[precision]  # which from_pretrained goes by, whatever the file holds
        file = "model.safetensors"
    else:
        config, file = network, "diffusion_pytorch_model.safetensors"
    write_whole(folder / "config.json", lambda part: part.write_text(config.to_json_string(), encoding="utf-8"))
    write(weights, folder / file, precision)
