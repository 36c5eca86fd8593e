"""The files that hold adapters: diffusers', kohya's, LyCORIS', embeddings, and whole checkpoints with it all merged."""

from lit_edm.sdxl.formats.merged import write_merged
from lit_edm.sdxl.formats.reading import LORA_FILE, read_adapter
from lit_edm.sdxl.formats.whole import trains_weights, write_network
from lit_edm.sdxl.formats.writing import Precision, write_diffusers, write_embeddings, write_kohya

__all__ = [
    "LORA_FILE",
    "Precision",
    "read_adapter",
    "trains_weights",
    "write_diffusers",
    "write_embeddings",
    "write_kohya",
    "write_merged",
    "write_network",
]
