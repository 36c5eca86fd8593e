"""Times a picture here against the bare pipeline of diffusers: `python scripts/benchmark_rendering.py`."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import auto_cli

from lit_edm.batch import PictureRequest
from lit_edm.modules import SDXLModule
from lit_edm.modules.generation import Generation
from lit_edm.sdxl import DiffusersSampler
from lit_edm.sdxl.sizes import SizeName
from lit_edm.sdxl.tiny import make_tiny_sdxl

PROMPT, GUIDANCE = "a sailboat on a calm sea at sunrise", 5.0


def main(side: int = 128, num_steps: int = 20, rounds: int = 15, scheduler: str = "EulerDiscreteScheduler") -> None:
    """Renders with a tiny base and with one whose UNet has 58 million parameters, both with random weights.

    In each round the pipeline and the module render a picture one after the other, with the same scheduler and the
    same guidance, from a prompt to pixels. What counts is the CPU time of this process, which does not grow when other
    programs want the cores, too.

    Args:
        side: Height and width of the pictures in pixels, a multiple of 8.
        num_steps: Steps of the scheduler.
        rounds: Pictures of each.
        scheduler: Class of the scheduler in diffusers.
    """
    print(f"{side} x {side} px, {num_steps} steps of {scheduler}, {rounds} rounds, {torch.get_num_threads()} threads")
    sizes: tuple[SizeName, ...] = ("tiny", "small")
    for size in sizes:
        with TemporaryDirectory() as folder:
            make_tiny_sdxl(Path(folder), size=size)
            sampler = DiffusersSampler(scheduler, num_steps)
            module, parameters = module_of(folder, sampler)
            contenders = {"pipeline": pipeline_renderer(folder, sampler, side), "lit_edm": renderer(module, side)}
            times = alternating(contenders, rounds)
        print(f"{size}: {parameters / 1e6:.1f} M parameters")
        for who, seconds in times.items():
            print(f"  {who:8} median {1e3 * median(seconds):8.1f} ms, best {1e3 * min(seconds):8.1f} ms")
        pairs = [ours / theirs for theirs, ours in zip(times["pipeline"], times["lit_edm"], strict=True)]
        best = min(times["lit_edm"]) / min(times["pipeline"])
        print(f"  ratio    median {median(pairs):.3f} of the rounds', {best:.3f} of the best")


def module_of(folder: str, sampler: DiffusersSampler) -> tuple[SDXLModule, int]:
    """Returns the module and the number of its UNet's parameters."""
    module = SDXLModule(folder, adapter=None, generation=Generation(sampler=sampler, guidance_scale=GUIDANCE))
    module.configure_model()
    return module.eval(), sum(parameter.numel() for parameter in module.denoiser.unet.parameters())


def renderer(module: SDXLModule, side: int) -> Callable[[int], torch.Tensor]:
    """Returns what renders a picture of a seed as `lit-edm predict` does: pixels (1, 3, H, W), about [-1, 1]."""

    def render(seed: int) -> torch.Tensor:
        request = PictureRequest(index=0, prompt=PROMPT, size=(side, side), seed=seed, scale=1.0)
        with torch.inference_mode():
            return module.render([request])

    return render


def pipeline_renderer(folder: str, sampler: DiffusersSampler, side: int) -> Callable[[int], torch.Tensor]:
    """Returns what renders the same picture by diffusers alone: pixels (1, 3, H, W) in [0, 1]."""
    import diffusers
    from diffusers import StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, sampler.scheduler).from_config(pipeline.scheduler.config)

    def render(seed: int) -> torch.Tensor:
        with torch.inference_mode():
            return pipeline(
                PROMPT,
                height=side,
                width=side,
                num_inference_steps=sampler.num_steps,
                guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
            ).images

    return render


def alternating(contenders: dict[str, Callable[[int], torch.Tensor]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds that each takes for a picture in each round, after one that is not counted.

    Raises:
        RuntimeError: They do not render the same.
    """
    theirs, ours = (contenders[name](0) for name in ("pipeline", "lit_edm"))
    if not torch.allclose(theirs, (ours / 2 + 0.5).clamp(0, 1), atol=1e-3):
        raise RuntimeError("the pictures differ, so their times mean nothing")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for seed in range(rounds):
        for name in sorted(contenders, reverse=bool(seed % 2)):  # who begins takes turns
            start = time.process_time()
            contenders[name](seed)
            times[name].append(time.process_time() - start)
    return times


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
