import sys

import pytest
import torch
from sklearn.datasets import load_digits

from lit_edm.batch import DescribesLabelledImages, LabelledBatch
from lit_edm.data import DigitsDataModule
from lit_edm.errors import InputError


def test_digits_are_those_of_scikit_learn() -> None:
    data = DigitsDataModule(held_out=0.0, batch_size=1797)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert set(batch) == set(LabelledBatch.__annotations__)
    assert (batch["image"].shape, batch["image"].dtype) == ((1797, 1, 8, 8), torch.float32)
    assert (batch["label"].shape, batch["label"].dtype) == ((1797,), torch.int64)
    assert (batch["image"].min(), batch["image"].max()) == (-1, 1)
    raw = load_digits()
    known = {(tuple(image.flatten()), label) for image, label in zip(raw.images, raw.target, strict=True)}
    seen = ((batch["image"] + 1) * 8).flatten(1).tolist()
    assert {(tuple(image), label) for image, label in zip(seen, batch["label"].tolist(), strict=True)} == known


def test_describes_its_images() -> None:
    data = DigitsDataModule()
    assert isinstance(data, DescribesLabelledImages)
    assert (data.image_shape, len(data.class_names)) == ((1, 8, 8), 10)


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'lit-edm\[digits\]'"):
        DigitsDataModule().setup("fit")
