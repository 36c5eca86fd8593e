from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_edm.cache import DiskCache, MemoryCache
from lit_edm.data.images import ImageFile
from lit_edm.data.items import Item
from lit_edm.data.latents import LatentStore
from lit_edm.data.team import Team
from lit_edm.data.transforms import RandomViews, View
from lit_edm.errors import InputError

Save = Callable[..., Path]


def item_of(path: Path, size: tuple[int, int] = (16, 16)) -> Item:
    image = ImageFile(path)
    return Item(image, "a", image.size(), size)


def store_of(*items: Item, cache: MemoryCache | DiskCache | None = None, settings: str = "vae") -> LatentStore:
    return LatentStore(cache or MemoryCache(), settings, {item.image: item.image.digest() for item in items})


def fill(store: LatentStore, items: list[Item], views: RandomViews) -> int:
    """Keeps what is missing and returns how much that was."""
    encoded = []
    store.fill(items, views, lambda pixels: encoded.append(1) or encode(pixels), Team())
    return len(encoded)


def encode(pixels: Tensor) -> Tensor:
    assert pixels.shape[:2] == (1, 3)
    return torch.nn.functional.avg_pool2d(pixels, 8)


@pytest.fixture
def item(save: Save) -> Item:
    return item_of(save("a.png", Image.effect_noise((24, 16), 60).convert("RGB")))


@pytest.mark.parametrize("views", [RandomViews(), RandomViews(random_flip=True), RandomViews(True, True, crops=3)])
def test_each_view_has_its_own_moments(item: Item, views: RandomViews) -> None:
    store = store_of(item)
    assert fill(store, [item], views) == len(views.all(item.size))
    assert fill(store, [item], views) == 0
    for view in views.all(item.size):
        assert store.get(item, view).equal(encode(item.pixels(view)[None])[0])


def test_views_that_show_the_same_are_kept_once(save: Save) -> None:
    square = item_of(save("square.png", Image.new("RGB", (32, 32))))
    assert fill(store_of(square), [square, square], RandomViews(True, False, crops=5)) == 1


def test_keys_say_all_that_moments_follow_from(item: Item, save: Save) -> None:
    moved = item_of(save("sub/other_name.png", Image.open(item.image.path)))  # type: ignore[attr-defined]
    other = item_of(save("b.png", Image.effect_noise((24, 16), 60).convert("RGB")))
    smaller = item_of(item.image.path, (8, 8))  # type: ignore[attr-defined]
    store, view = store_of(item, moved, other), View((16, 16))
    key = store.key(item, view)
    assert store_of(moved).digests[moved.image] == store.digests[item.image], "else the test means nothing"
    assert store.key(moved, view) == key, "whatever a picture is called"
    differing = [
        store.key(other, view),
        store.key(item, View((16, 16), flip=True)),
        store.key(item, View((16, 16), position=0.9)),
        store.key(smaller, View((8, 8))),
        store_of(item, settings="another vae").key(item, view),
    ]
    assert len({key, *differing}) == 6


def test_processes_have_all_looked_before_one_begins(item: Item, save: Save, tmp_path: Path) -> None:
    """Else the later ones would share out less than the first did."""
    items = [item, item_of(save("b.png", Image.new("RGB", (24, 16), "red")))]
    store = store_of(*items, cache=DiskCache(str(tmp_path / "cache")))
    waits: list[int] = []
    team = Team(0, 2, lambda: waits.append(len(list((tmp_path / "cache").rglob("*.safetensors")))))
    store.fill(items, RandomViews(), encode, team)
    assert waits == [0, 1]


def test_a_changed_picture_is_encoded_again(item: Item, tmp_path: Path) -> None:
    cache, path = DiskCache(str(tmp_path / "cache")), item.image.path  # type: ignore[attr-defined]
    assert fill(store_of(item, cache=cache), [item], RandomViews()) == 1
    assert fill(store_of(item, cache=cache), [item], RandomViews()) == 0, "a second run"
    Image.new("RGB", (24, 16), "red").save(path)
    store = store_of(item, cache=cache)
    assert fill(store, [item], RandomViews()) == 1
    assert store.get(item, View((16, 16)))[:, 0, 0].tolist() == [1, -1, -1]


def test_a_damaged_file_is_made_again(item: Item, tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path / "cache"))
    fill(store_of(item, cache=cache), [item], RandomViews(random_flip=True))
    broken = next((tmp_path / "cache").rglob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:-7])
    assert fill(store_of(item, cache=cache), [item], RandomViews(random_flip=True)) == 1


def test_latents_that_vanish_during_a_run_are_named(item: Item) -> None:
    with pytest.raises(InputError, match=r"a\.png are gone from data\.init_args\.latent_cache"):
        store_of(item).get(item, View((16, 16)))
