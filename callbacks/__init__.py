"""What happens when: the pivot, pictures, files. Installed as lit_edm.callbacks."""

from lit_edm.callbacks.freeze_embeddings import FreezeEmbeddings
from lit_edm.callbacks.save_adapter import SaveAdapter
from lit_edm.callbacks.validation_images import ValidationImages

__all__ = ["FreezeEmbeddings", "SaveAdapter", "ValidationImages"]
