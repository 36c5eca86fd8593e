"""Data modules of labelled images, part of which is held out from training."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from lit_edm.batch import LabelledBatch, LabelledExample
from lit_edm.data.draws import Draw, Pool
from lit_edm.data.loading import check_least, make_loader, make_training_loader
from lit_edm.errors import InputError


class Drawn(Dataset[LabelledBatch]):
    """Makes batches of draws of labelled images, in which what torch draws at random follows from the draws alone.

    Args:
        dataset: The images; it may crop and flip them with torch's own generator.
    """

    def __init__(self, dataset: Dataset[LabelledExample]) -> None:
        self.dataset = dataset

    def __getitem__(self, draws: Sequence[Draw]) -> LabelledBatch:
        state = torch.default_generator.get_state()
        try:
            batch = default_collate([self._example(draw) for draw in draws])
        finally:
            torch.default_generator.set_state(state)  # so that loading in the training process changes nothing else
        return {**batch, "weight": torch.tensor([draw.weight for draw in draws]), "images": draws[0].among}  # type: ignore[return-value]

    def _example(self, draw: Draw) -> LabelledExample:
        torch.default_generator.manual_seed(draw.seed)
        return self.dataset[draw.item]


class LabelledImagesDataModule(LightningDataModule, ABC):
    """Trains on some of a set of labelled images and validates on the rest.

    Batches follow from the run's seed and the epoch alone, whatever the number of workers; a resumed run goes on with
    the one that was next.

    Args:
        held_out: Share of the images that is validated on and never trained on, in [0, 1).
        batch_size: Images in a batch, on each device.
        num_workers: Processes that load images; 0 loads them in the training process.
        seed: What the choice of held-out images follows from.
    """

    class_names: list[str]
    image_shape: tuple[int, int, int]

    def __init__(self, held_out: float, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        self.held_out = held_out
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    @abstractmethod
    def read(self) -> tuple[Dataset[LabelledExample], Dataset[LabelledExample]]:
        """Reads all images; returns them as they are trained on and as they are validated on, in the same order."""

    def setup(self, stage: str) -> None:
        """Reads the images and chooses those to hold out."""
        check_least(self, batch_size=1, num_workers=0, seed=0)
        if not 0 <= self.held_out < 1:
            raise InputError(f"data.init_args.held_out is {self.held_out}: give a share in [0, 1)")
        trained, validated = self.read()
        count = len(validated)  # type: ignore[arg-type] (datasets with an index have a length)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        border = round(self.held_out * count)
        self.train_set = Subset(trained, order[border:])
        self.val_set = Subset(validated, order[:border])

    def train_dataloader(self) -> DataLoader[LabelledBatch]:
        """Returns the shuffled batches of an epoch.

        Raises:
            InputError: The trainer would have single examples in their place.
        """
        count, (_, *size) = len(self.train_set), self.image_shape
        return make_training_loader(Drawn(self.train_set), [Pool(range(count), (size[0], size[1]), count)], self)

    def val_dataloader(self) -> DataLoader[LabelledExample] | list[DataLoader[LabelledExample]]:
        """Returns the held-out images, always in the same order; an empty list if there are none."""
        return make_loader(self.val_set, self.batch_size, self.num_workers) if len(self.val_set) else []
