from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from lit_edm.data.captions import CaptionRules
from lit_edm.data.dataset import HeldOutImages, TrainingImages
from lit_edm.data.draws import Draw
from lit_edm.data.images import ImageFile
from lit_edm.data.items import Item
from lit_edm.data.transforms import RandomViews, View

Save = Callable[..., Path]
Positions = Callable[[int, int], Image.Image]


@pytest.fixture
def item(save: Save, positions: Positions) -> Item:
    """A picture of 48 x 32 pixels, trained on as 32 x 32."""
    return Item(ImageFile(save("a.png", positions(48, 32))), "a, b, c", (32, 48), (32, 32))


def test_a_batch_is_a_function_of_its_draws(item: Item) -> None:
    rules = CaptionRules("TOK, ", dropout=0.3, shuffle_tags=True)
    data = TrainingImages([replace(item, rules=rules)], RandomViews(random_crop=True, random_flip=True))
    draws = [Draw(0, seed, 1.0) for seed in range(40)]
    batch = data[draws]
    torch.manual_seed(1)
    again = data[list(reversed(draws))]
    for key in batch.keys() - {"images"}:
        values = batch[key]  # type: ignore[literal-required]
        assert list(values) == list(reversed(again[key])) if key == "caption" else values.flip(0).equal(again[key])
    assert len(set(batch["caption"])) == 7, "six orders of tags, or none"
    assert len(set(batch["crop_top_left"][:, 1].tolist())) > 5
    flipped = batch["image"][:, 0, 0, 0] > batch["image"][:, 0, 0, -1]
    assert 5 < int(flipped.sum()) < 35


@pytest.mark.parametrize("views", [RandomViews(), RandomViews(random_crop=True), RandomViews(True, True)])
def test_pixels_are_those_at_the_corner_told(item: Item, views: RandomViews) -> None:
    batch = TrainingImages([item], views)[[Draw(0, seed, 1.0) for seed in range(10)]]
    for image, (top, left) in zip(batch["image"], batch["crop_top_left"].tolist(), strict=True):
        levels = ((image + 1) * 127.5).round()
        columns = torch.arange(48.0)
        if levels[0, 0, 0] > levels[0, 0, 1]:
            columns = columns.flip(0)
        assert levels[0, 0].equal(columns[left : left + 32])
        assert levels[1, 0, 0] == top == 0
    assert batch["original_size"].tolist() == [[32, 48]] * 10


def test_draws_say_the_weight(item: Item) -> None:
    weights = TrainingImages([item], RandomViews())[[Draw(0, 1, 0.25), Draw(0, 2, 1.5)]]["weight"]
    assert (weights.tolist(), weights.dtype) == ([0.25, 1.5], torch.float32)


def test_teacher_is_told_only_if_there_is_one(item: Item) -> None:
    draws = [Draw(0, 1, 1.0), Draw(1, 1, 1.0)]
    assert "teacher" not in TrainingImages([item, item], RandomViews())[draws]
    batch = TrainingImages([item, replace(item, caption="class", teacher=True)], RandomViews())[draws]
    assert (batch["teacher"], batch["caption"]) == ([False, True], ["a, b, c", "class"])


class TestMasks:
    @pytest.fixture
    def masked(self, item: Item, save: Save) -> Item:
        """White where the column of the picture is at least 24."""
        mask = Image.new("L", (48, 32))
        mask.paste(255, (24, 0, 48, 32))
        return replace(item, mask=ImageFile(save("a.mask.png", mask)))

    def test_move_with_their_images(self, masked: Item) -> None:
        batch = TrainingImages([masked], RandomViews(True, True))[[Draw(0, seed, 1.0) for seed in range(20)]]
        columns = ((batch["image"][:, :1] + 1) * 127.5).round()
        assert batch["mask"].equal((columns >= 24).float())

    def test_are_ones_for_images_without(self, masked: Item, item: Item) -> None:
        batch = TrainingImages([masked, item], RandomViews())[[Draw(0, 1, 1.0), Draw(1, 1, 1.0)]]
        assert batch["mask"].shape == (2, 1, 32, 32)
        assert batch["mask"][1].eq(1).all()
        assert not batch["mask"][0].eq(1).all()
        assert "mask" not in TrainingImages([item], RandomViews())[[Draw(0, 1, 1.0)]]

    def test_are_resized_with_their_images(self, masked: Item) -> None:
        weights = replace(masked, size=(16, 16)).weights(View((16, 16), position=0.0))
        assert weights.shape == (1, 16, 16)
        assert weights[..., :11].eq(0).all()
        assert weights[..., 13:].eq(1).all()


def test_held_out_images_never_change(item: Item) -> None:
    data = HeldOutImages([replace(item, rules=CaptionRules("TOK, "))] * 2)
    batch = default_collate([data[0], data[1]])
    assert batch["caption"] == ["TOK, a, b, c"] * 2
    assert batch["crop_top_left"].tolist() == [[0, 8]] * 2
    assert batch["original_size"].tolist() == [[32, 48]] * 2
    assert batch["image"][0].equal(batch["image"][1])
    assert len(data) == 2
