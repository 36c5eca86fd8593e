"""SDXL: what the network F is, what it is conditioned on, and what of it is trained."""

from lit_edm.sdxl.adapters import Adapter, FullFinetune
from lit_edm.sdxl.checkpoint import SDXLCheckpoint
from lit_edm.sdxl.conditioning import Conditioning, SDXLConditioner
from lit_edm.sdxl.denoiser import SDXLDenoiser
from lit_edm.sdxl.from_file import FromFile
from lit_edm.sdxl.latents import LatentSpace
from lit_edm.sdxl.lora import DoRA, LoCon, LoRA
from lit_edm.sdxl.lycoris import LoHa, LoKr
from lit_edm.sdxl.schedulers import DiffusersSampler
from lit_edm.sdxl.tokens import Placeholders

__all__ = [
    "Adapter",
    "Conditioning",
    "DiffusersSampler",
    "DoRA",
    "FromFile",
    "FullFinetune",
    "LatentSpace",
    "LoCon",
    "LoHa",
    "LoKr",
    "LoRA",
    "Placeholders",
    "SDXLCheckpoint",
    "SDXLConditioner",
    "SDXLDenoiser",
]
