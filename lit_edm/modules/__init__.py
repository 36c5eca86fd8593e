"""Lightning modules: the networks, the loss and the optimizer put together."""

from lit_edm.modules.sdxl import SDXLModule

__all__ = ["SDXLModule"]
