from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_edm.data import SquareCrop
from lit_edm.data.transforms import RandomViews, View, covering, golden, to_tensor
from lit_edm.errors import InputError

Positions = Callable[[int, int], Image.Image]


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
        square, top_left = crop(to_tensor(picture))
        (top, left), (column, row) = top_left.tolist(), _levels(square)[:2].round()
        flipped = bool(column[0, 0] > column[0, -1])
        columns = torch.arange(width).flip(0) if flipped else torch.arange(width)
        assert random_flip or not flipped
        # Enlarged pictures are resized back to one pixel a position, but for a level where positions end abruptly.
        assert (column - columns[left : left + 32]).abs().max() <= enlarged - 1
        assert (row - torch.arange(top, top + 32)[:, None]).abs().max() <= enlarged - 1


@pytest.mark.parametrize(("shape", "corner"), [((48, 32), [0, 8]), ((32, 49), [8, 0]), ((32, 32), [0, 0])])
def test_centre_crop_lies_in_the_middle(positions: Positions, shape: tuple[int, int], corner: list[int]) -> None:
    assert SquareCrop(32)(to_tensor(positions(*shape)))[1].tolist() == corner


@pytest.mark.parametrize("shape", [(35, 32), (32, 35)])
def test_random_crops_reach_every_place(positions: Positions, shape: tuple[int, int]) -> None:
    crop, picture = SquareCrop(32, random_crop=True), to_tensor(positions(*shape))
    corners = {tuple(crop(picture)[1].tolist()) for _ in range(200)}
    assert corners == {(i, 0) if shape[0] == 32 else (0, i) for i in range(4)}


def test_half_of_the_pictures_are_flipped(positions: Positions) -> None:
    torch.manual_seed(0)
    crop, picture = SquareCrop(32, random_flip=True), to_tensor(positions(32, 32))
    flipped = sum(bool(crop(picture)[0][0, 0, 0] > -1) for _ in range(200))
    assert 70 < flipped < 130


def test_draws_follow_the_seed_of_torch(positions: Positions) -> None:
    crop, picture = SquareCrop(32, random_crop=True, random_flip=True), to_tensor(positions(96, 32))

    def draw() -> Tensor:
        torch.manual_seed(1)
        return torch.stack([crop(picture)[0] for _ in range(5)])

    assert torch.equal(draw(), draw())


@pytest.mark.parametrize(
    ("picture", "size", "resized"),
    [
        ((40, 60), (20, 20), (20, 30)),
        ((60, 40), (20, 20), (30, 20)),
        ((7, 5), (16, 16), (22, 16)),
        ((1, 1), (8, 8), (8, 8)),
        ((9, 9), (9, 9), (9, 9)),
        ((40, 60), (20, 30), (20, 30)),
        ((40, 60), (30, 20), (30, 45)),
        ((1000, 1501), (832, 1216), (832, 1249)),
        ((1000, 1001), (832, 1216), (1215, 1216)),
    ],
)
def test_pictures_are_resized_to_cover(
    picture: tuple[int, int], size: tuple[int, int], resized: tuple[int, int]
) -> None:
    assert covering(picture, size) == resized


def test_no_picture_is_stretched() -> None:
    """The same scale for both sides, to half a pixel; one side fits exactly and the other does not fall short."""
    for height in range(10, 90, 7):
        for width in range(10, 90, 3):
            for size in [(32, 32), (24, 40), (40, 24)]:
                resized = covering((height, width), size)
                assert resized[0] >= size[0]
                assert resized[1] >= size[1]
                assert resized[0] == size[0] or resized[1] == size[1]
                scale = max(size[0] / height, size[1] / width)
                assert abs(resized[0] - scale * height) <= 0.5 + 1e-9
                assert abs(resized[1] - scale * width) <= 0.5 + 1e-9


@pytest.mark.parametrize("shape", [(48, 32), (61, 97), (20, 13)])
def test_resizing_equals_pillow(shape: tuple[int, int]) -> None:
    width, height = shape
    noise = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    size = covering((height, width), (24, 24))
    ours = View(size)(to_tensor(Image.fromarray(noise)))
    pillow = to_tensor(Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC))
    assert (ours.int() - pillow.int()).abs().max() <= 1


class TestView:
    @pytest.mark.parametrize("size", [(40, 40), (24, 40), (40, 24)])
    @pytest.mark.parametrize("position", [None, 0.0, 0.3, 0.999])
    @pytest.mark.parametrize("flip", [False, True])
    def test_holds_what_lies_where_it_says(
        self, positions: Positions, size: tuple[int, int], position: float | None, flip: bool
    ) -> None:
        view, picture = View(size, flip, position), (40, 40)
        cut = view.cut(picture)
        column, row = view(to_tensor(positions(40, 40)))[:2].int()
        columns = torch.arange(40).flip(0) if flip else torch.arange(40)
        assert cut.resized == picture
        assert column.equal(columns[cut.left : cut.left + size[1]].int().expand(size))
        assert row.equal(torch.arange(cut.top, cut.top + size[0])[:, None].int().expand(size))
        assert 0 <= cut.top <= 40 - size[0]
        assert 0 <= cut.left <= 40 - size[1]

    @pytest.mark.parametrize(
        ("position", "left"), [(None, 2), (0.0, 0), (0.5, 3), (0.9999, 5), (1 / 6, 1), (0.1666, 0)]
    )
    def test_positions_reach_from_edge_to_edge(self, position: float | None, left: int) -> None:
        """Each of the six places that there are gets a sixth of the positions."""
        assert View((4, 4), position=position).cut((4, 9)) == ((4, 9), 0, left)
        assert View((4, 4), position=position).cut((9, 4)) == ((9, 4), left, 0)

    def test_of_a_mask(self) -> None:
        """Bilinear, so that no edge rings."""
        mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
        mask[:, :, 20:] = 255
        seen = View((8, 8), flip=True)(mask, mode="bilinear").int()
        assert (seen[..., 0] == 255).all()
        assert (seen[..., -1] == 0).all()
        assert (seen.diff(dim=-1) <= 0).all()


class TestRandomViews:
    def test_follow_from_their_generator_alone(self) -> None:
        views = RandomViews(random_crop=True, random_flip=True)

        def drawn(seed: int) -> list[View]:
            generator = torch.Generator().manual_seed(seed)
            return [views.draw((8, 8), generator) for _ in range(20)]

        before = torch.get_rng_state()
        assert drawn(1) == drawn(1) != drawn(2)
        assert before.equal(torch.get_rng_state())

    @pytest.mark.parametrize(
        ("views", "count"),
        [
            (RandomViews(), 1),
            (RandomViews(crops=3), 1),
            (RandomViews(random_flip=True), 2),
            (RandomViews(random_crop=True, crops=3), 3),
            (RandomViews(True, True, crops=3), 6),
        ],
    )
    def test_all_are_those_that_can_be_drawn(self, views: RandomViews, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        assert len(views.all((8, 16))) == len(set(views.all((8, 16)))) == count
        assert {views.draw((8, 16), generator) for _ in range(100)} == set(views.all((8, 16)))

    def test_fixed_places_are_far_apart(self) -> None:
        """As the multiples of the golden ratio are: no gap is more than about twice the mean."""
        assert golden(0) == 0.5
        for count in range(2, 40):
            places = torch.tensor([golden(number) for number in range(count)]).sort().values
            assert 0 <= places[0] < places[-1] < 1
            around = torch.cat([places, places[:1] + 1])
            assert around.diff().min() > 0.4 / count
            assert around.diff().max() < 2.2 / count


def test_pixels_span_minus_one_to_one() -> None:
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    square, _ = SquareCrop(8)(levels)
    assert square.dtype == torch.float32
    torch.testing.assert_close(square[:, 3, 3], torch.tensor([-1.0, -0.6, 1.0]))


@pytest.mark.parametrize("resolution", [0, -8])
def test_resolution_below_one(resolution: int) -> None:
    with pytest.raises(InputError, match=rf"data\.init_args\.resolution is {resolution}"):
        SquareCrop(resolution)
