import pytest

from lit_edm.data.buckets import AspectBuckets, nearest
from lit_edm.errors import InputError

# Height and width of the wide half of the table in appendix I of the SDXL paper (Podell et al. 2023).
WIDE = [
    *[(512, width) for width in (2048, 1984, 1920, 1856)],
    *[(576, width) for width in (1792, 1728, 1664)],
    *[(640, width) for width in (1600, 1536)],
    *[(704, width) for width in (1472, 1408, 1344)],
    *[(768, width) for width in (1344, 1280)],
    *[(832, width) for width in (1216, 1152)],
    *[(896, width) for width in (1152, 1088)],
    *[(960, width) for width in (1088, 1024)],
]


def test_defaults_are_what_sdxl_was_trained_with() -> None:
    """Its table lacks 1344 x 704 alone, the counterpart of 704 x 1344."""
    tall = [(height, width) for width, height in WIDE]
    assert set(AspectBuckets().sizes(1024)) == {*WIDE, (1024, 1024), *tall}


@pytest.mark.parametrize(("step", "resolution", "max_aspect"), [(64, 1024, 2.0), (8, 64, 4.0), (32, 500, 1.5)])
def test_shapes_are_multiples_of_about_the_area(step: int, resolution: int, max_aspect: float) -> None:
    sizes = AspectBuckets(step, max_aspect).sizes(resolution)
    assert len(sizes) == len(set(sizes)) > 2
    assert {(width, height) for height, width in sizes} == set(sizes)
    for size in sizes:
        assert size[0] % step == size[1] % step == 0
        assert 0.9 <= size[0] * size[1] / resolution**2 <= 1
        assert max(size) / min(size) <= max_aspect


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((3000, 3000), (1024, 1024)),
        ((2000, 3000), (832, 1216)),  # 3 : 2
        ((3000, 2000), (1216, 832)),
        ((1080, 1920), (768, 1344)),  # 16 : 9
        ((100, 1000), (512, 2048)),  # beyond the table
        ((704, 1408), (704, 1408)),
    ],
)
def test_shape_of_a_picture(picture: tuple[int, int], size: tuple[int, int]) -> None:
    assert nearest(picture, AspectBuckets().sizes(1024)) == size


def test_the_larger_of_equally_near_shapes() -> None:
    assert nearest((10, 20), [(16, 32), (20, 40), (18, 36)]) == (20, 40)


def test_step_too_large_for_the_resolution() -> None:
    with pytest.raises(InputError, match=r"data\.init_args\.buckets\.step is 64, .* 96 x 96 pixels: give a smaller"):
        AspectBuckets(64, max_aspect=2).sizes(96)


@pytest.mark.parametrize(("key", "value"), [("step", 0), ("max_aspect", 0.5)])
def test_settings_below_one(key: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"data\.init_args\.buckets\.{key} is {value}: give at least 1"):
        AspectBuckets(**{key: value})  # type: ignore[arg-type]
