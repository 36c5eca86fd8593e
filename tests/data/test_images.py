import hashlib
import pickle
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL import ImageFile as Decoder

from lit_edm.data.images import ImageFile, check_images, find_images, read_mask
from lit_edm.errors import InputError

Save = Callable[..., Path]
ORIENTATION = 0x0112


def read_image(path: Path) -> Image.Image:
    return ImageFile(path).read()


def test_finds_images_of_all_kinds_and_depths_sorted(tmp_path: Path, save: Save) -> None:
    names = ["Z.PNG", "a/b/c.webp", "a/d.jpeg", "e.JPG", "f.bmp", "g.jfif"]
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


def test_pictures_that_are_not_read_are_counted(tmp_path: Path, save: Save, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.gif", "c/d.TIFF", ".e.gif"):
        save(name)
    assert find_images(tmp_path) == [tmp_path / "a.png"]
    said = f"2 picture(s) left out (.gif, .tiff), the first: {tmp_path / 'b.gif'}; save them as PNG"
    assert [record.getMessage() for record in caplog.records] == [said]


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
def test_exif_rotation(tmp_path: Path, save: Save, positions: Callable[..., Image.Image], suffix: str) -> None:
    picture = positions(48, 32)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the picture is seen upright after a quarter turn clockwise
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    image = read_image(save(f"a.{suffix}", picture, exif=exif, **options))
    assert image.size == (32, 48)
    assert ImageFile(tmp_path / f"a.{suffix}").size() == (48, 32)
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


@pytest.mark.parametrize("read", [ImageFile.read, ImageFile.check, read_mask, lambda image: check_images([image])])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.95])
def test_truncated_image_is_named(save: Save, read: Callable[[ImageFile], object], name: str, kept: float) -> None:
    path = save(name, _noise())
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(
        InputError, match=rf"{re.escape(str(path))} cannot be read.*delete it or save it again"
    ) as error:
        read(ImageFile(path))
    assert "\n" not in str(error.value)


def test_missing_image_is_named(tmp_path: Path) -> None:
    image = ImageFile(tmp_path / "gone.png")
    for use in (image.read, image.size, image.digest, image.check):
        with pytest.raises(InputError, match=r"gone\.png cannot be read.*No such file"):
            use()


def test_broken_image_among_good_ones_is_named(save: Save) -> None:
    images = [ImageFile(save(f"{number}.png", _noise())) for number in range(40)]
    check_images(images)
    images[31].path.write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"31\.png cannot be read"):
        check_images(images)


@pytest.mark.parametrize("limit", [64 * 64 // 3, 64 * 64 - 1])
@pytest.mark.parametrize("warned", ["error", "ignore"])  # what the program around us does about Pillow's warning
@pytest.mark.filterwarnings("default")
def test_decompression_bomb_is_refused(save: Save, monkeypatch: pytest.MonkeyPatch, limit: int, warned: str) -> None:
    image = ImageFile(save("bomb.png", _noise()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter(warned, Image.DecompressionBombWarning)
        for use in (image.read, image.size, image.check):
            with pytest.raises(
                InputError, match=rf"bomb\.png is too large \(more than {limit} pixels .*save it smaller"
            ):
                use()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    image.check()


def test_jpegs_are_checked_at_an_eighth_of_their_size(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    image = ImageFile(save("a.jpg", _noise()))
    sizes = []
    getexif = Image.Image.getexif
    monkeypatch.setattr(Image.Image, "getexif", lambda image: sizes.append(image.size) or getexif(image))
    image.check()
    assert sizes == [(8, 8)]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_upright_image_without_its_pixels(
    save: Save, monkeypatch: pytest.MonkeyPatch, name: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = ImageFile(save(name, Image.new("RGB", (48, 32)), **({} if name == "a.bmp" else {"exif": exif})))
    width, height = image.read().size

    def fail(*_: object) -> None:
        raise AssertionError("pixels decoded")

    monkeypatch.setattr(Decoder.ImageFile, "load", fail)
    assert image.size() == (height, width)


@pytest.mark.parametrize(("orientation", "size"), [(None, (32, 48)), (6, (48, 32)), (3, (32, 48))])
def test_size_of_a_png_with_its_exif_data_at_the_end(
    save: Save, orientation: int | None, size: tuple[int, int]
) -> None:
    path = save("a.png", Image.new("RGB", (48, 32)))
    if orientation:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        data, end = path.read_bytes()[:-12], path.read_bytes()[-12:]
        content = exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(content)) + b"eXIf" + content
        path.write_bytes(data + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + end)
    height, width = ImageFile(path).size()
    assert (height, width) == size
    assert ImageFile(path).read().size == (width, height)


def test_digest_is_that_of_the_contents(save: Save) -> None:
    first, same, other = (
        ImageFile(save(f"{name}.png", image)) for name, image in zip("abc", [None, None, _noise()], strict=True)
    )
    assert first.digest() == same.digest() == hashlib.sha256(first.path.read_bytes()).hexdigest()
    assert first.digest() != other.digest()


def test_goes_to_workers_without_its_pixels(save: Save) -> None:
    image = ImageFile(save("a.png", _noise()))
    image.read()
    packed = pickle.dumps(image)
    assert pickle.loads(packed) == image
    assert len(packed) < 1000
    assert image.name == str(image.path)


def test_mask_is_grey(save: Save) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = read_mask(ImageFile(save("a.png", Image.new("RGB", (4, 2), (51, 51, 51)), exif=exif)))
    assert (turned.mode, turned.size, turned.getpixel((0, 0))) == ("L", (2, 4), 51)
    deep = read_mask(ImageFile(save("b.png", Image.fromarray(np.full((2, 4), 0x8000, dtype=np.uint16)))))
    assert (deep.mode, deep.getpixel((0, 0))) == ("L", 0x80)
    binary = read_mask(ImageFile(save("c.png", Image.new("1", (4, 2), 1))))
    assert (binary.mode, binary.getpixel((0, 0))) == ("L", 255)


@pytest.mark.parametrize(("alpha", "seen"), [(0, 0), (255, 255), (102, 102)])
def test_transparent_parts_of_a_mask_do_not_count(save: Save, alpha: int, seen: int) -> None:
    mask = read_mask(ImageFile(save("a.png", Image.new("RGBA", (4, 4), (255, 255, 255, alpha)))))
    assert mask.getpixel((0, 0)) == seen
