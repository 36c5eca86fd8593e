"""Lightning modules: the networks, the loss and the optimizer put together."""

from lit_edm.modules.diffusion import DiffusionModule
from lit_edm.modules.fsdp2 import FSDP2Strategy
from lit_edm.modules.networks import SmallUNet
from lit_edm.modules.pixels import EDMModule
from lit_edm.modules.sdxl import SDXLModule

__all__ = ["DiffusionModule", "EDMModule", "FSDP2Strategy", "SDXLModule", "SmallUNet"]
