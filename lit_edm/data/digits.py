"""The handwritten digits that come with scikit-learn: real images of 8 x 8 pixels, without a download."""

import torch
from torch.utils.data import Dataset

from lit_edm.batch import LabelledExample
from lit_edm.data.labelled import LabelledImagesDataModule
from lit_edm.errors import InputError


class Digits(Dataset[LabelledExample]):
    """1,797 digits (Alpaydin and Kaynak 1998), 8 x 8 pixels of 17 grey levels, scaled to [-1, 1].

    Raises:
        InputError: scikit-learn is not installed.
    """

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError(
                "the digits come with scikit-learn, which is not installed: pip install 'lit-edm[digits]'"
            ) from error
        pixels, labels = load_digits(return_X_y=True)
        self.images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
        self.labels: list[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> LabelledExample:
        return {"image": self.images[index], "label": self.labels[index]}


class DigitsDataModule(LabelledImagesDataModule):
    """Trains on handwritten digits of 8 x 8 pixels, which come with scikit-learn.

    Args:
        held_out: Share of the digits that is validated on and never trained on, in [0, 1).
        batch_size: Digits in a batch, on each device.
        num_workers: Processes that load digits; 0 loads them in the training process.
        seed: What the choice of held-out digits follows from.
    """

    def __init__(self, held_out: float = 0.2, batch_size: int = 128, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(held_out, batch_size, num_workers, seed)
        self.image_shape = (1, 8, 8)
        self.class_names = [str(digit) for digit in range(10)]

    def read(self) -> tuple[Digits, Digits]:
        """Returns the digits, which are trained on and validated on as they are."""
        digits = Digits()
        return digits, digits
