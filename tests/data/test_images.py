import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_edm.data.images import check_images, find_images, read_image
from lit_edm.errors import InputError

Save = Callable[..., Path]
ORIENTATION = 0x0112


def test_finds_images_of_all_kinds_and_depths_sorted(tmp_path: Path, save: Save) -> None:
    names = ["Z.PNG", "a/b/c.webp", "a/d.jpeg", "e.JPG", "f.bmp"]
    for name in reversed(names):
        save(name)
    assert find_images(tmp_path) == [tmp_path / name for name in names]


def test_ignores_other_and_hidden_files(tmp_path: Path, save: Save) -> None:
    image = save("a.png")
    save("._a.png")
    save(".thumbnails/a.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("a.txt", ".DS_Store", "Thumbs.db", "metadata.jsonl", "notes.json", "png"):
        (tmp_path / name).write_text("no image")
    assert find_images(tmp_path) == [image]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist.*data\.init_args\.root"):
        find_images(tmp_path / "nowhere")


def test_file_for_a_folder(save: Save) -> None:
    with pytest.raises(InputError, match=r"a\.png is a file.*data\.init_args\.root"):
        find_images(save("a.png"))


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.tiff").touch()
    with pytest.raises(InputError, match=r"no images \(\.jpg, .*other files there: 2\).*data\.init_args\.root"):
        find_images(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_exif_rotation(save: Save, positions: Callable[..., Image.Image], suffix: str) -> None:
    picture = positions(48, 32)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the picture is seen upright after a quarter turn clockwise
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    image = read_image(save(f"a.{suffix}", picture, exif=exif, **options))
    assert image.size == (32, 48)
    difference = np.rot90(np.asarray(picture), k=-1).astype(int) - np.asarray(image)
    assert np.abs(difference).max() <= (3 if suffix == "jpg" else 0)


@pytest.mark.parametrize(("alpha", "seen"), [(0, 255), (255, 0), (102, 153)])
def test_transparency_is_put_on_white(save: Save, alpha: int, seen: int) -> None:
    rgba = read_image(save("a.png", Image.new("RGBA", (4, 4), (0, 0, 0, alpha))))
    grey = read_image(save("b.png", Image.new("LA", (4, 4), (0, alpha))))
    assert rgba.getpixel((0, 0)) == grey.getpixel((0, 0)) == (seen, seen, seen)


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_transparent_colour_of_a_palette_is_put_on_white(save: Save, transparency: int | bytes) -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([0, 0, 255, 255, 0, 0])
    picture.putpixel((1, 0), 1)
    image = read_image(save("a.png", picture, transparency=transparency))
    assert [image.getpixel((0, 0)), image.getpixel((1, 0))] == [(255, 255, 255), (255, 0, 0)]


def test_sixteen_bits_of_grey_are_scaled(save: Save) -> None:
    levels = np.array([[0, 0x4000, 0x8000, 0xFFFF]], dtype=np.uint16)
    image = read_image(save("a.png", Image.fromarray(levels)))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 0x40, 0x80, 0xFF)]


@pytest.mark.parametrize(
    ("name", "mode", "colour", "seen"),
    [
        ("a.png", "L", 7, (7, 7, 7)),
        ("a.png", "1", 1, (255, 255, 255)),
        ("a.jpg", "L", 7, (7, 7, 7)),
        ("a.jpg", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_other_modes_become_rgb(save: Save, name: str, mode: str, colour: int, seen: tuple[int, int, int]) -> None:
    image = read_image(save(name, Image.new(mode, (16, 16), colour)))
    assert (image.mode, image.getpixel((5, 5))) == ("RGB", seen)


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("read", [read_image, lambda path: check_images([path])])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.95])
def test_truncated_image_is_named(save: Save, read: Callable[[Path], object], name: str, kept: float) -> None:
    path = save(name, _noise())
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(InputError, match=rf"{re.escape(str(path))} cannot be read.*delete it or save it again"):
        read(path)


def test_broken_image_among_good_ones_is_named(save: Save) -> None:
    paths = [save(f"{number}.png", _noise()) for number in range(40)]
    check_images(paths)
    paths[31].write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"31\.png cannot be read"):
        check_images(paths)


def test_decompression_bomb_is_named(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save("bomb.png", _noise())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 3)
    with pytest.raises(InputError, match=r"bomb\.png cannot be read.*bomb"):
        check_images([path])


def test_jpegs_are_checked_at_an_eighth_of_their_size(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save("a.jpg", _noise())
    sizes = []
    getexif = Image.Image.getexif
    monkeypatch.setattr(Image.Image, "getexif", lambda image: sizes.append(image.size) or getexif(image))
    check_images([path])
    assert sizes == [(8, 8)]
