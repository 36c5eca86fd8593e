"""What `benchmark.py` measures: a run of configs/sdxl_pivotal.yaml on an untrained base and generated images."""

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from lit_edm.cli import CLI
from lit_edm.errors import InputError
from lit_edm.sdxl import SDXLCheckpoint
from lit_edm.sdxl.sizes import SIZES, SizeName
from lit_edm.sdxl.tiny import made_in, make_pipeline, make_unet, make_vae

CONFIG = Path(__file__).parents[1] / "configs/sdxl_pivotal.yaml"
IMAGES = 4
Part = Literal["before", "after"]
"""Of a run with a pivot, before which tokens learn, too."""


@dataclass(frozen=True)
class Settings:
    """Times training against the bare networks, and adds what it finds to benchmarks/training.json and .md.

    Args:
        size: Of the base, whose weights are random: tiny, small (58 million parameters in the UNet, with SDXL's
            layers) or full.
        side: Height and width of the images in pixels.
        batch_size: Images in a step.
        pivot: Which part of pivotal tuning to measure: before the pivot tokens learn and text encoders run.
        adapter: What is trained of the UNet.
        optimizer: GroupedProdigy as in the config, or AdamW at 1e-4.
        precision: Of the trainer.
        gradient_checkpointing: Recompute all activations.
        compile: Compile the transformer blocks, one for all.
        caches: Keep latents and, after the pivot, encoded captions.
        num_workers: Processes that load images.
        accelerator: Lightning's name of what to train on.
        steps: Steps to time, as often as the bare networks.
        turn: Steps after which it is the other's turn; on a GPU several let the host run ahead, as it does in training.
        warmup: Steps before.
        profiled: Further steps whose phases are timed; with 10 of them one writes logs.
        clock: Wall time, or CPU time of this process, which does not grow when other programs want the cores.
        memory: Whether to measure peak memory too, each in a process of its own.
        no_sync: Fail if a step waits for the GPU. Nothing is logged then, since to write down a loss is to wait for it.
        overrides: Further arguments of `lit-edm fit`, such as ["--model.adapter.rank=16"].
        note: What is new in this run, for the table.
    """

    size: SizeName = "small"
    side: int = 256
    batch_size: int = 3
    pivot: Literal["before", "after", "both"] = "both"
    adapter: Literal["LoRA", "DoRA"] = "LoRA"
    optimizer: Literal["GroupedProdigy", "AdamW"] = "GroupedProdigy"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    gradient_checkpointing: bool = False
    compile: bool = False
    caches: bool = True
    num_workers: int = 0
    accelerator: str = "auto"
    steps: int = 20
    turn: int = 1
    warmup: int = 3
    profiled: int = 10
    clock: Literal["wall", "cpu"] = "wall"
    memory: bool = True
    no_sync: bool = False
    overrides: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.turn < 1 or self.steps % self.turn or self.warmup < 1 or self.profiled < 1:
            raise InputError(
                f"steps={self.steps}, turn={self.turn}, warmup={self.warmup}, profiled={self.profiled}: each must be 1 "
                "or more, and steps a multiple of turn"
            )
        if self.no_sync and not torch.cuda.is_available():
            raise InputError("no_sync is about GPUs, and there is none: leave it out")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the run that are measured, in order."""
        return ("before", "after") if self.pivot == "both" else (self.pivot,)

    @property
    def length(self) -> int:
        """Steps of each part."""
        return self.warmup + self.steps + self.profiled


@dataclass(frozen=True)
class UntrainedSDXL(SDXLCheckpoint):
    """A base whose networks are made where they are to be, at random, rather than read; its folder holds configs.

    Args:
        size: Of the base.
        device: Where networks are made.
    """

    size: SizeName = "tiny"
    device: torch.device = torch.device("cpu")

    def check_files(self) -> None:
        """Asks for no weights, for there are none."""

    def load_text_encoders(self, dtype: torch.dtype) -> Any:
        """Makes both text encoders, frozen, in the given precision."""
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        first, second = (CLIPTextConfig.from_pretrained(f"{self.pretrained}/text_encoder{n}") for n in ("", "_2"))
        with made_in(dtype, self.device):
            encoders = CLIPTextModel(first), CLIPTextModelWithProjection(second)
        return tuple(encoder.eval().requires_grad_(False) for encoder in encoders)

    def load_unet(self, dtype: torch.dtype) -> Any:
        """Makes the UNet, frozen, in the given precision."""
        with made_in(dtype, self.device):
            return make_unet(SIZES[self.size]).requires_grad_(False)

    def load_vae(self, dtype: torch.dtype) -> Any:
        """Makes the VAE, frozen, in the given precision."""
        with made_in(dtype, self.device):
            return make_vae(SIZES[self.size]).requires_grad_(False)


def be_quiet() -> None:
    """Leaves out what Lightning tells of a run: this one is like all others."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")


def build(settings: Settings, folder: Path) -> CLI:
    """Returns trainer, module and images as the command line makes them; their files are in the folder."""
    write_configs(folder / "base", settings.size)
    write_images(folder / "images", settings.side)
    cli = CLI(run=False, save_config_callback=None, args=arguments(settings, folder))
    cli.model.checkpoint = UntrainedSDXL(f"{folder}/base", size=settings.size, device=cli.trainer.strategy.root_device)
    return cli


def arguments(settings: Settings, folder: Path) -> list[str]:
    """Returns arguments of `lit-edm fit` that measure what the settings say."""
    steps = settings.length * len(settings.parts)
    loggers = [
        {"class_path": name, "init_args": {"save_dir": str(folder), "name": "run", "version": ""}}
        for name in ("ResumableCSVLogger", "TensorBoardLogger")
    ]
    pivot = {"both": 0.5, "after": 0.0, "before": 1.0}[settings.pivot]
    values = {
        "config": str(CONFIG),
        "model.pretrained": f"{folder}/base",
        "model.variant": None,
        "model.vae": None,
        "model.adapter": settings.adapter,
        "model.gradient_checkpointing": settings.gradient_checkpointing,
        "model.compile": settings.compile,
        "model.text_cache": "MemoryCache" if settings.caches else None,
        "data.root": f"{folder}/images",
        "data.instance_prompt": "a photo of TOK",
        "data.resolution": settings.side,
        "data.repeats": -(-steps * settings.batch_size // IMAGES),
        "data.latent_cache": "MemoryCache" if settings.caches else None,
        "data.batch_size": settings.batch_size,
        "data.num_workers": settings.num_workers,
        "trainer.max_steps": steps,
        "trainer.precision": settings.precision,
        "trainer.accelerator": settings.accelerator,
        "trainer.devices": 1,
        "trainer.default_root_dir": str(folder),
        "trainer.logger": loggers,
        "trainer.log_every_n_steps": steps + 1 if settings.no_sync else 10,
        "trainer.callbacks": [{"class_path": "FreezeEmbeddings", "init_args": {"ti_frac": pivot}}],
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        "trainer.enable_checkpointing": False,
    }
    if settings.optimizer == "AdamW":
        values |= {"model.optimizer": "AdamW", "model.optimizer.lr": 1e-4}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return [f"--{key}={text}" for key, text in texts.items()] + list(settings.overrides)


def write_configs(folder: Path, size: SizeName) -> None:
    """Writes what a base in diffusers' layout has, with empty files in place of weights, made and not read."""
    with made_in(torch.float32, "meta"):
        pipeline = make_pipeline(SIZES[size])
    pipeline.save_config(folder)
    for name in ("unet", "vae", "scheduler"):
        getattr(pipeline, name).save_config(folder / name)
        (folder / name / "diffusion_pytorch_model.safetensors").touch()
    for name in ("text_encoder", "text_encoder_2"):
        getattr(pipeline, name).config.save_pretrained(folder / name)
        (folder / name / "model.safetensors").touch()
    for name in ("tokenizer", "tokenizer_2"):
        getattr(pipeline, name).save_pretrained(folder / name)


def write_images(folder: Path, side: int) -> None:
    """Writes images of noise."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        levels = generator.integers(256, size=(side, side, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.png")
