import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_edm.batch import ClassImageRequest
from lit_edm.data.items import Item
from lit_edm.data.rendered import RenderedImage, check_rendered, render_missing
from lit_edm.data.team import Team
from lit_edm.errors import InputError
from lit_edm.seeds import seed_of

Save = Callable[..., Path]


class TestRenderedImage:
    def test_is_what_was_rendered(self, tmp_path: Path) -> None:
        pixels = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        image = RenderedImage(tmp_path / "class.png", (8, 8), 0)
        image.write(pixels, image.request("a dog"))
        levels = torch.tensor(list(image.read().tobytes())).view(8, 8, 3).permute(2, 0, 1)
        assert (levels / 127.5 - 1 - pixels).abs().max() <= 0.5 / 127.5 + 1e-6

    def test_levels_beyond_the_range_are_cut_off(self, tmp_path: Path) -> None:
        image = RenderedImage(tmp_path / "class.png", (1, 1), 0)
        image.write(torch.tensor([-1.5, 0.0, 1.5])[:, None, None], image.request("a dog"))
        assert image.read().getpixel((0, 0)) == (0, 128, 255)

    def test_is_there_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(self: Image.Image, path: Path, **_: object) -> None:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(Image.Image, "save", interrupted)
        picture = RenderedImage(tmp_path / "class.png", (8, 8), 0)
        with pytest.raises(KeyboardInterrupt):
            picture.write(torch.zeros(3, 8, 8), picture.request("a dog"))
        assert list(tmp_path.iterdir()) == []

    def test_noise_follows_from_its_number_and_the_seed_of_the_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PL_GLOBAL_SEED", "5")
        images = [RenderedImage(Path("x.png"), (8, 16), number) for number in (1, 2)]
        assert [image.request("a dog") for image in images] == [
            {"prompt": "a dog", "size": (8, 16), "seed": seed_of(5, number)} for number in (1, 2)
        ]

    def test_says_what_it_was_rendered_from(self, tmp_path: Path) -> None:
        image = RenderedImage(tmp_path / "class.png", (8, 16), 0)
        image.write(torch.zeros(3, 8, 16), image.request("a dög"))
        with Image.open(image.path) as opened:
            told = json.loads(opened.info["lit_edm"])
        assert told == {"prompt": "a dög", "size": [8, 16], "seed": seed_of(0, 0)}
        check_rendered(image, "a dög", (8, 16))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_that_is_not_finite_is_not_written(self, tmp_path: Path, value: float) -> None:
        image = RenderedImage(tmp_path / "class.png", (8, 8), 0)
        pixels = torch.zeros(3, 8, 8)
        pixels[1, 2, 3] = value
        with pytest.raises(InputError, match=r"'a dog' has pixels that are not finite, .* model\.init_args\.vae"):
            image.write(pixels, image.request("a dog"))
        assert list(tmp_path.iterdir()) == []


def test_images_that_say_nothing_of_themselves_pass(save: Save) -> None:
    check_rendered(RenderedImage(save("class_00000.png"), (8, 8), 0), "a dog", (8, 8))


def test_processes_that_come_one_after_the_other_render_all_of_it_once(tmp_path: Path) -> None:
    """The second finds what the first has rendered already, and still does its own part."""
    images = [RenderedImage(tmp_path / f"class_{number:05}.png", (8, 8), number) for number in range(22)]
    items = [Item(image, "a dog", (8, 8), (8, 8)) for image in images]
    asked: list[int] = []

    def render(requests: list[ClassImageRequest]) -> Tensor:
        asked.extend(request["seed"] for request in requests)
        return torch.zeros(len(requests), 3, 8, 8)

    with pytest.raises(InputError, match="is not there on every machine"):  # for the first does not wait here
        render_missing(items, render, Team(0, 2))
    render_missing(items, render, Team(1, 2))
    assert sorted(asked) == sorted(image.request("a dog")["seed"] for image in images)
