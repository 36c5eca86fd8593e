"""What the keys of adapters' files mean: diffusers' of today and of 2023, kohya's, LyCORIS', and embeddings'."""

import re

from lit_edm.sdxl.formats.names import from_kohya_name
from lit_edm.sdxl.updates import NETWORKS

FACTORS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
}
"""What kohya calls the factors that diffusers, of today and of 2023, has under these names."""

KOHYA_FACTORS = (
    *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"),
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
)
"""The factors that are known, by kohya's and LyCORIS' names."""

EMBEDDINGS = {"clip_l": "clip_l", "clip_g": "clip_g", "text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
"""Which text encoder's embeddings are under a key: under that of most programs, or diffusers'."""


def embeddings_at(key: str) -> tuple[str, str] | None:
    """Returns the word and the text encoder (clip_l, clip_g) that a key has embeddings of, or None.

    The word is empty where new tokens are in a file of their own. A1111 reads those bundled with an adapter, at
    bundle_emb.<word>.clip_l.
    """
    if key in EMBEDDINGS:
        return "", EMBEDDINGS[key]
    bundle, _, rest = key.partition(".")
    word, _, encoder = rest.rpartition(".")
    return (word, encoder) if bundle == "bundle_emb" and word and encoder in EMBEDDINGS.values() else None


def factor_at(key: str) -> tuple[str, str, str] | None:
    """Returns the network, the layer and, by kohya's name, the factor that is at a key, or None if it is not known."""
    key = re.sub(r"\.processor\.(\w+)_lora\.(down|up)\.", r".\1.lora.\2.", key)  # as diffusers had them in 2023
    key = key.replace(".to_out.lora.", ".to_out.0.lora.")
    for factor in (*FACTORS, *KOHYA_FACTORS):
        if key.endswith(f".{factor}") and (place := layer_of(key.removesuffix(f".{factor}"))):
            return *place, FACTORS.get(factor, factor)
    return None


def layer_of(name: str) -> tuple[str, str] | None:
    """Returns network and layer of the part of a key in front of the factor, or None if it is not known."""
    network, _, layer = name.partition(".")
    if network == "unet" and layer:
        return network, layer
    if network in NETWORKS and layer:
        return network, f"text_model.{layer.removeprefix('text_model.')}"  # which transformers 5 leaves out of some
    if network in ("down_blocks", "mid_block", "up_blocks"):
        return "unet", name  # as a UNet alone is saved
    return from_kohya_name(name)
