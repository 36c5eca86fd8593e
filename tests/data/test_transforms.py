from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_edm.data import SquareCrop
from lit_edm.data.transforms import resize_short_side
from lit_edm.errors import InputError

Positions = Callable[[int, int], Image.Image]


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _levels(square: Tensor) -> Tensor:
    """Undoes the mapping to [-1, 1]."""
    return (square + 1) * 127.5


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32), (200, 32)])
@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("random_flip", [False, True])
@pytest.mark.parametrize("enlarged", [1, 2])
def test_crop_holds_what_lies_at_its_corner(
    positions: Positions, shape: tuple[int, int], random_crop: bool, random_flip: bool, enlarged: int
) -> None:
    width, height = shape
    picture = positions(width, height).resize((width * enlarged, height * enlarged), Image.Resampling.NEAREST)
    crop = SquareCrop(32, random_crop, random_flip)
    for _ in range(20):
        square, top_left = crop(_tensor(picture))
        (top, left), (column, row) = top_left.tolist(), _levels(square)[:2].round()
        flipped = bool(column[0, 0] > column[0, -1])
        columns = torch.arange(width).flip(0) if flipped else torch.arange(width)
        assert random_flip or not flipped
        # Enlarged pictures are resized back to one pixel a position, but for a level where positions end abruptly.
        assert (column - columns[left : left + 32]).abs().max() <= enlarged - 1
        assert (row - torch.arange(top, top + 32)[:, None]).abs().max() <= enlarged - 1


@pytest.mark.parametrize(("shape", "corner"), [((48, 32), [0, 8]), ((32, 49), [8, 0]), ((32, 32), [0, 0])])
def test_centre_crop_lies_in_the_middle(positions: Positions, shape: tuple[int, int], corner: list[int]) -> None:
    assert SquareCrop(32)(_tensor(positions(*shape)))[1].tolist() == corner


@pytest.mark.parametrize("shape", [(35, 32), (32, 35)])
def test_random_crops_reach_every_place(positions: Positions, shape: tuple[int, int]) -> None:
    crop, picture = SquareCrop(32, random_crop=True), _tensor(positions(*shape))
    corners = {tuple(crop(picture)[1].tolist()) for _ in range(200)}
    assert corners == {(i, 0) if shape[0] == 32 else (0, i) for i in range(4)}


def test_half_of_the_pictures_are_flipped(positions: Positions) -> None:
    torch.manual_seed(0)
    crop, picture = SquareCrop(32, random_flip=True), _tensor(positions(32, 32))
    flipped = sum(bool(crop(picture)[0][0, 0, 0] > -1) for _ in range(200))
    assert 70 < flipped < 130


def test_draws_follow_the_seed_of_torch(positions: Positions) -> None:
    crop, picture = SquareCrop(32, random_crop=True, random_flip=True), _tensor(positions(96, 32))

    def draw() -> Tensor:
        torch.manual_seed(1)
        return torch.stack([crop(picture)[0] for _ in range(5)])

    assert torch.equal(draw(), draw())


@pytest.mark.parametrize(
    ("shape", "length", "size"),
    [
        ((60, 40), 20, (20, 30)),
        ((40, 60), 20, (30, 20)),
        ((5, 7), 16, (22, 16)),
        ((1, 1), 8, (8, 8)),
        ((9, 9), 9, (9, 9)),
    ],
)
def test_resizing_keeps_the_shape(
    positions: Positions, shape: tuple[int, int], length: int, size: tuple[int, int]
) -> None:
    resized = resize_short_side(_tensor(positions(*shape)), length)
    assert resized.shape == (3, *size)
    assert resized.dtype == torch.uint8


@pytest.mark.parametrize("shape", [(48, 32), (61, 97), (20, 13)])
def test_resizing_equals_pillow(shape: tuple[int, int]) -> None:
    width, height = shape
    noise = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    ours = resize_short_side(_tensor(Image.fromarray(noise)), 24)
    size = (ours.shape[2], ours.shape[1])
    pillow = _tensor(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
    assert (ours.int() - pillow.int()).abs().max() <= 1


def test_pixels_span_minus_one_to_one() -> None:
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    square, _ = SquareCrop(8)(levels)
    assert square.dtype == torch.float32
    torch.testing.assert_close(square[:, 3, 3], torch.tensor([-1.0, -0.6, 1.0]))


@pytest.mark.parametrize("resolution", [0, -8])
def test_resolution_below_one(resolution: int) -> None:
    with pytest.raises(InputError, match=rf"data\.init_args\.resolution is {resolution}"):
        SquareCrop(resolution)
