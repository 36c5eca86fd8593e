"""Counts what training the real SDXL takes of a GPU, without one: `python scripts/memory_table.py`.

Writes benchmarks/memory.md. All tensors have shapes and no values; see lit_edm.sdxl.memory.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmark_floor import BareNetworks
from benchmark_report import table
from benchmark_setup import Settings, UntrainedSDXL, be_quiet, build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lit_edm.modules import SDXLModule
from lit_edm.modules.diffusion import trainable
from lit_edm.optim import GroupedProdigy
from lit_edm.sdxl.checkpointing import measure
from lit_edm.sdxl.memory import GIB, Autocast, autocast_of, bytes_of, state_of
from lit_edm.sdxl.sizes import SizeName

FILE = Path(__file__).parents[1] / "benchmarks/memory.md"
HALF = torch.bfloat16
META = torch.device("meta")
ABOUT = """\
# Memory of SDXL at 1024 px, counted

    python scripts/memory_table.py

What tensors of the real SDXL take in bf16-mixed, with an adapter of rank 8, two new tokens and GroupedProdigy, counted
from shapes, with no GPU. The peak of a step is that of all tensors alive at once in a forward and backward pass besides
those in the columns before it. What CUDA and cuDNN take for themselves, about half a GiB, is not in it, nor what an
allocator wastes.
"""


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once and were not before.

    Attributes:
        now: Bytes at present.
        peak: The most so far.
    """

    def __init__(self, before: Iterator[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Looks at what an operation returns."""
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return output

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def main() -> None:
    """Writes the tables."""
    be_quiet()
    lora, dora = module_of("LoRA"), module_of("DoRA")
    networks = {"LoRA": lora, "DoRA": dora}
    texts = "--model.text_encoder_quantization=int8"
    smaller = {
        "LoRA, encoders int8": module_of("LoRA", overrides=(texts,)),
        "LoRA, all int8": module_of("LoRA", overrides=(texts, "--model.quantization=int8")),
    }
    parts = [
        *("", "## A run with caches and gradient_checkpointing: true, GiB", ""),
        *table(
            ["adapter", "batch", "part", "UNet", "encoders", "trained, gradients, optimizer", "peak of a step", "sum"],
            [
                run(module, name, count, learns)
                for name, module in (networks | smaller).items()
                for count in (1, 3)
                for learns in (True, False)
            ],
            text=3,
        ),
        "",
        f"While caches are filled: VAE {gib(bytes_of(lora.latents.parameters()))}, and {gib(encoding(lora))} for an "
        "image as it is encoded; nothing else but what is trained. All networks are there together once, before: "
        f"{gib(bytes_of(lora.parameters()))}.",
        *("", "## A budget for the UNet's activations", ""),
        *table(
            ["adapter", "batch", "budget GiB", "blocks computed again", "GiB kept", "TFLOP computed again"],
            [row for name, module in networks.items() for count in (1, 3) for row in budgets(module, name, count)],
            text=1,
        ),
    ]
    FILE.write_text(ABOUT + "\n".join(parts) + "\n", encoding="utf-8")


def module_of(adapter: Any, size: SizeName = "full", overrides: tuple[str, ...] = ()) -> SDXLModule:
    """Returns a module with the networks of a base, the real SDXL if not given, none of which have values."""
    settings = Settings(
        size=size,
        side=64,
        adapter=adapter,
        precision="bf16-mixed",
        caches=False,
        accelerator="cpu",
        overrides=overrides,
    )
    with TemporaryDirectory() as folder:
        module = build(settings, Path(folder)).model
        module.checkpoint = UntrainedSDXL(f"{folder}/base", size=size, device=META)
        module.network_dtype = lambda: HALF
        module.configure_model()
    return module


def run(module: SDXLModule, name: str, count: int, learns: bool) -> list[str]:
    """Returns a row of what a part of pivotal tuning takes, before the pivot while tokens learn, or after."""
    unet, encoders = module.denoiser.unet, module.conditioner.encoders
    trained = trainable(unet) + (trainable(encoders) if learns else [])
    frozen = [bytes_of(p for p in part.parameters() if not p.requires_grad) for part in (unet, encoders)]
    frozen[1] *= learns
    own = bytes_of(trained) * 2 + state(trained)
    compute_all_again(module)
    step = peak_of_step(BareNetworks(module, learns), count, module.latents.shape(1024, 1024))
    sizes = [*frozen, own, step]
    return [name, str(count), "before" if learns else "after", *map(gib, sizes), f"**{gib(sum(sizes))}**"]


def compute_all_again(module: SDXLModule) -> None:
    """Does as gradient_checkpointing: true, and has the backward pass compute as under autocast, too."""
    module.denoiser.unet.enable_gradient_checkpointing(again(autocast_of(module.denoiser.unet, HALF)))
    module.conditioner.enable_gradient_checkpointing()
    for part in list[Any](module.conditioner.encoders.modules()):
        if hasattr(part, "_gradient_checkpointing_func"):
            part._gradient_checkpointing_func = again(HALF)


def again(dtype: torch.dtype) -> Callable[..., Any]:
    """Returns what has a block computed again under an autocast."""
    contexts = partial(tuple, (nullcontext(), Autocast(dtype)))
    return partial(checkpoint, use_reentrant=False, context_fn=contexts)


def peak_of_step(networks: BareNetworks, count: int, shape: tuple[int, int, int]) -> int:
    """Returns the most bytes that a forward and backward pass takes besides weights and gradients."""
    for parameter in trainable(networks):
        parameter.grad = torch.zeros_like(parameter)
    inputs = networks.inputs(count, shape, META)
    known = (*networks.parameters(), *networks.buffers(), *inputs.values())
    gradients = [parameter.grad for parameter in networks.parameters() if parameter.grad is not None]
    autocast = Autocast(HALF)

    @contextmanager
    def of_unet(device: str) -> Iterator[None]:
        autocast.dtype = autocast_of(networks.unet, HALF)
        yield
        autocast.dtype = HALF

    networks.autocast = of_unet  # type: ignore[assignment] (there is no autocast of tensors without values)
    with Alive(iter((*known, *gradients))) as alive:
        with autocast:
            output = networks(**inputs)
        output.backward(torch.ones_like(output))
    return alive.peak


def encoding(module: SDXLModule) -> int:
    """Returns the most bytes that the VAE takes besides its weights to encode an image of 1024 px."""
    vae, image = module.latents.vae, torch.empty(1, 3, 1024, 1024, device=META)
    with Alive(iter((*vae.parameters(), image))) as alive, Autocast(torch.float32), torch.no_grad():
        vae.encode(image)
    return alive.peak


def state(trained: Sequence[nn.Parameter]) -> int:
    """Returns the bytes that the optimizer keeps."""
    like = nn.Parameter(torch.zeros(64, 64))
    return round(sum(p.numel() for p in trained) * state_of(GroupedProdigy([like])) / like.numel())


def budgets(module: SDXLModule, name: str, count: int) -> Iterator[list[str]]:
    """Yields a row for each of some budgets, from the least to the first under which nothing is computed again."""
    activations = measure(module.denoiser.unet, HALF, (count, *module.latents.shape(1024, 1024)), learns_text=True)
    steps = [activations.always / GIB, *(count * part for part in (1, 2, 3, 4, 6, 8, 12)), activations.total / GIB]
    for budget in sorted(step for step in steps if activations.always <= step * GIB <= activations.total):
        again = activations.computed_again(budget * GIB)
        kept = activations.total - sum(block.size for block in again)
        flops = sum(block.flops for block in again) / 1e12
        yield [
            name,
            str(count),
            f"{budget:.2f}",
            f"{len(again)} of {len(activations.blocks)}",
            gib(kept),
            f"{flops:.2f}",
        ]


def gib(size: int) -> str:
    """Returns GiB as the tables have them."""
    return f"{size / GIB:.2f}"


if __name__ == "__main__":
    main()
