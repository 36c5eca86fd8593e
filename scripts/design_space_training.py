"""Training rows of the design space (Karras et al. 2022, Section 5): what preconditioning and loss are worth.

One network, data set, optimizer and sampler for all. A row changes the scalings around the network, the noise levels it
is trained at, and their weight; it is judged by how far its samples are from digits that were held out.
"""

import logging
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from math import log
from multiprocessing import get_context
from time import process_time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import Subset, default_collate

from lit_edm.batch import LabelledBatch, LabelledExample
from lit_edm.callbacks.ema import ExponentialMovingAverage, averaged
from lit_edm.data import DigitsDataModule
from lit_edm.edm import (
    EDMLoss,
    EDMPreconditioning,
    EDMWeighting,
    LogUniform,
    Preconditioning,
    ScaledLogNormal,
    Scalings,
    SNRWeighting,
    VEPreconditioning,
    VPNoise,
    VPPreconditioning,
    karras_sigmas,
    sample_heun,
)
from lit_edm.metrics import FrechetDistance
from lit_edm.modules import EDMModule, SmallUNet
from lit_edm.modules.diffusion import seed_of

SIGMA_MIN, SIGMA_MAX, NUM_STEPS = 0.002, 80.0, 18
"""The sampler of every row: Algorithm 1 on the steps of Eq. 5, 35 evaluations of the network."""


@dataclass(frozen=True)
class Budget:
    """What all rows have alike.

    Args:
        steps: Optimizer steps.
        batch_size: Digits in a step.
        learning_rate: Of Adam.
        channels: Of the network, at full resolution.
        dropout: Of the network.
    """

    steps: int = 1200
    batch_size: int = 128
    learning_rate: float = 3e-3
    channels: int = 32
    dropout: float = 0.1

    def marks(self) -> list[int]:
        """Returns the steps after which samples are judged."""
        return sorted({max(1, self.steps >> k) for k in range(5)})


@dataclass(frozen=True)
class InRange(Preconditioning):
    """A column of Table 1 whose c_noise is stretched to where that of EDM lies.

    VP counts timesteps up to 999, for which its authors' network has another embedding. The frequencies of
    FourierFeatures are chosen for ln(sigma) / 4 and would alias; the same interval for every column is fair to each.

    Args:
        column: The scalings.
    """

    column: Preconditioning

    def __call__(self, sigma: Tensor) -> Scalings:
        """Returns the scalings, c_noise mapped so that it agrees with ln(sigma) / 4 at the sampler's two ends."""
        scalings = self.column(sigma)
        low, high = self.column(sigma.new_tensor([SIGMA_MIN, SIGMA_MAX])).c_noise
        share = (scalings.c_noise - low) / (high - low)
        return scalings._replace(c_noise=(log(SIGMA_MIN) + share * log(SIGMA_MAX / SIGMA_MIN)) / 4)


def rows(sigma_data: float) -> dict[str, tuple[Preconditioning, EDMLoss]]:
    """Returns preconditioning and loss of every row: two columns of Table 1, then two steps from VP to EDM.

    The steps are those from config C to D and from D to E of the paper's Table 2: first the scalings alone, the loss
    being VP's, then noise levels and weight. The laws of VP and VE are for pixels in [-1, 1], as these are; EDM's is
    scaled to the RMS of the images.
    """
    vp_loss = EDMLoss(VPNoise(), SNRWeighting())
    edm = EDMPreconditioning(sigma_data)
    return {
        "VP": (InRange(VPPreconditioning()), vp_loss),
        "VE": (InRange(VEPreconditioning()), EDMLoss(LogUniform(), SNRWeighting())),
        "EDM preconditioning": (edm, vp_loss),
        "EDM preconditioning and loss": (edm, EDMLoss(ScaledLogNormal(sigma_data), EDMWeighting(sigma_data))),
    }


def one_batch(images: Subset[LabelledExample]) -> LabelledBatch:
    """Returns all images as one batch."""
    return default_collate([images[k] for k in range(len(images))])


class Digits:
    """The digits to train on and those held out, each as one batch."""

    def __init__(self, batch_size: int = 128) -> None:
        self.module = DigitsDataModule(batch_size=batch_size)
        self.module.setup("fit")
        self.trained: LabelledBatch = one_batch(self.module.train_set)
        self.held_out: LabelledBatch = one_batch(self.module.val_set)
        self.sigma_data = self.trained["image"].square().mean().sqrt().item()

    def distance(self, images: Tensor) -> float:
        """Returns the Frechet distance of images (B, 1, 8, 8) to the held-out digits, over pixels."""
        metric = FrechetDistance()
        metric.update(self.held_out["image"], real=True)
        metric.update(images, real=False)
        return metric.compute().item()

    def noise(self, *seed: int) -> Tensor:
        """Returns as much noise as there are digits to train on: samples are as many as the floor is measured with."""
        generator = torch.Generator().manual_seed(seed_of(*seed))
        return torch.randn(self.trained["image"].shape, generator=generator)


@dataclass
class Judge(Callback):
    """Notes, as training goes, the Frechet distance of samples of the averaged weights.

    Args:
        digits: Whose classes are sampled.
        marks: Steps to sample after; twice as many samples after the last.
        seed: What the samples' noise follows from.
    """

    digits: Digits
    marks: list[int]
    seed: int
    distances: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def on_train_batch_end(self, trainer: Trainer, pl_module: EDMModule, outputs: Any, *_: Any) -> None:
        """Notes the loss; samples where there is a mark."""
        self.losses.append(outputs["loss"].item())
        if trainer.global_step in self.marks:
            sets = 2 if trainer.global_step == self.marks[-1] else 1
            with averaged(trainer, pl_module):
                found = [self.digits.distance(self._sample(pl_module, k)) for k in range(sets)]
            self.distances.append(sum(found) / sets)

    def _sample(self, module: EDMModule, k: int) -> Tensor:
        pairs = zip(self.digits.noise(self.seed, k).split(256), self.digits.trained["label"].split(256), strict=True)
        return torch.cat([module.sample(noise, label, NUM_STEPS) for noise, label in pairs])


def train(name: str, seed: int, budget: Budget) -> dict[str, Any]:
    """Trains one row from one seed; returns its Frechet distances at the marks, losses and processor time."""
    started = process_time()
    seed_everything(seed, verbose=False)
    digits = Digits(budget.batch_size)
    preconditioning, loss = rows(digits.sigma_data)[name]
    module = EDMModule(
        SmallUNet(1, num_classes=10, channels=budget.channels, dropout=budget.dropout),
        image_shape=(1, 8, 8),
        num_classes=10,
        preconditioning=preconditioning,
        loss=loss,
        optimizer=partial(Adam, lr=budget.learning_rate),
        sigma_min=SIGMA_MIN,
        sigma_max=SIGMA_MAX,
    )
    judge = Judge(digits, budget.marks(), seed)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=budget.steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExponentialMovingAverage(), judge],
    )
    trainer.fit(module, digits.module)
    tenth = max(1, budget.steps // 10)
    return {
        "frechet_distance": judge.distances,
        "first_loss": sum(judge.losses[:tenth]) / tenth,
        "last_loss": sum(judge.losses[-tenth:]) / tenth,
        "cpu_seconds": process_time() - started,
    }


def untrained(preconditioning: Preconditioning, digits: Digits) -> float:
    """Returns the Frechet distance before training, when F = 0: the network's last layer starts at zero."""
    sigmas = karras_sigmas(NUM_STEPS, SIGMA_MIN, SIGMA_MAX)
    noise = digits.noise(0, 0) * sigmas[0]
    return digits.distance(
        sample_heun(lambda x, sigma: preconditioning.denoise(lambda x, _: torch.zeros_like(x), x, sigma), noise, sigmas)
    )


def train_all(seeds: Iterable[int], budget: Budget, workers: int) -> dict[str, Any]:
    """Trains every row from every seed, each in one thread of a worker process; returns all that was found."""
    digits, seeds = Digits(), list(seeds)
    columns = rows(digits.sigma_data)
    runs: dict[str, list[dict[str, Any]]] = {name: [{} for _ in seeds] for name in columns}
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=be_modest) as pool:
        futures = {
            pool.submit(train, name, seed, budget): (name, k) for (k, seed), name in product(enumerate(seeds), columns)
        }
        for done, future in enumerate(as_completed(futures), start=1):
            name, k = futures[future]
            runs[name][k] = future.result()
            distance, seconds = runs[name][k]["frechet_distance"][-1], runs[name][k]["cpu_seconds"]
            print(f"{done:2d}/{len(futures)}  {name}, seed {seeds[k]}: {distance:.3f} ({seconds:.0f} s)", flush=True)
    return {
        "budget": asdict(budget),
        "seeds": seeds,
        "marks": budget.marks(),
        "sigma_data": digits.sigma_data,
        "trained_on": len(digits.trained["label"]),
        "held_out": len(digits.held_out["label"]),
        "floor": digits.distance(digits.trained["image"]),
        "untrained": {name: untrained(preconditioning, digits) for name, (preconditioning, _) in columns.items()},
        "runs": runs,
    }


def be_modest() -> None:
    """Keeps a worker to one thread and silent."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
