"""Measures how many images a second training could read: `python scripts/benchmark_loading.py`."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jsonargparse import auto_cli
from PIL import Image

from lit_edm.cache import DiskCache
from lit_edm.data import CaptionedImagesDataModule


def main(images: int = 64, resolution: int = 1024, num_workers: int = 2, batch_size: int = 4) -> None:
    """Reads JPEGs of 3 megapixels, cut at random and mirrored at random; then the latents of them that are kept.

    Args:
        images: Number of JPEGs; twice as many are read.
        resolution: Side of the training images in pixels.
        num_workers: Processes that load images.
        batch_size: Images in a batch.
    """
    with TemporaryDirectory() as folder:
        size = make_photos(Path(folder), images)
        data = CaptionedImagesDataModule(
            folder,
            instance_prompt="a photo",
            resolution=resolution,
            random_crop=True,
            random_flip=True,
            batch_size=batch_size,
            num_workers=num_workers,
            latent_cache=DiskCache(f"{folder}/latents"),
            cache_crops=1,
        )
        data.setup("fit")
        print(f"{images} JPEGs of 2048 x 1536 pixels, {size / images / 1e6:.1f} MB each, {num_workers} workers")
        print(f"pixels:  {speed(data):6.1f} images/s at {resolution} x {resolution}")
        data.fill_cache(lambda pixels: torch.randn(1, 8, *(side // 8 for side in pixels.shape[-2:])), "random numbers")
        print(f"latents: {speed(data):6.1f} images/s")


def make_photos(folder: Path, count: int) -> int:
    """Writes JPEGs of landscapes of coarse and fine noise, as hard to decode as photos; returns their size in bytes."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(256, size=(24, 32, 3), dtype=np.uint8)).resize((2048, 1536))
        fine = generator.normal(scale=12, size=(1536, 2048, 1))
        levels = np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.jpg", quality=90)
    return sum(path.stat().st_size for path in folder.glob("*.jpg"))


def speed(data: CaptionedImagesDataModule) -> float:
    """Returns the images a second of an epoch, after another in which workers start and files are read first."""
    loader = data.train_dataloader()
    count = sum(len(batch["caption"]) for batch in loader)
    start = time.perf_counter()
    for _ in loader:
        pass
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
