from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_edm.data.folder import CaptionedImage
from lit_edm.data.images import ImageFile
from lit_edm.data.prior import ClassImages, RenderedImage, TeacherPrior
from lit_edm.errors import InputError
from lit_edm.seeds import seed_of

Save = Callable[..., Path]


def examples_of(prior: ClassImages) -> list[CaptionedImage]:
    return prior.examples([], (16, 24))


class TestClassImages:
    def test_have_their_own_captions_or_the_prompt(self, tmp_path: Path, save: Save) -> None:
        save("a.png")
        save("b/c.jpg").with_suffix(".txt").write_text("a black dog")
        found = examples_of(ClassImages(str(tmp_path), "a dog"))
        assert [(image.image.name, image.caption) for image in found] == [
            (str(tmp_path / "a.png"), "a dog"),
            (str(tmp_path / "b" / "c.jpg"), "a black dog"),
        ]

    def test_only_what_lacks_is_rendered(self, tmp_path: Path, save: Save) -> None:
        save("a.png")
        save("class_00001.png")
        found = examples_of(ClassImages(str(tmp_path), "a dog", num_images=4))
        assert [image.image.name.rsplit("/")[-1] for image in found] == [
            "a.png",
            "class_00001.png",
            "class_00000.png",
            "class_00002.png",
        ]
        assert [isinstance(image.image, RenderedImage) for image in found] == [False, False, True, True]
        assert {image.caption for image in found} == {"a dog"}
        assert len(examples_of(ClassImages(str(tmp_path), "a dog", num_images=1))) == 2, "none is left out"

    def test_are_rendered_into_a_new_folder(self, tmp_path: Path) -> None:
        prior = ClassImages(str(tmp_path / "new" / "folder"), "a dog", num_images=3)
        images = [image.image for image in examples_of(prior)]
        assert [image.size() for image in images] == [(16, 24)] * 3
        for image in images:
            image.check()
            assert isinstance(image, RenderedImage)
            image.write(torch.zeros(3, 16, 24))
        again = [image.image for image in examples_of(prior)]
        assert [image.name for image in again] == [image.name for image in images]
        assert not any(isinstance(image, RenderedImage) for image in again)

    def test_that_were_rendered_beside_metadata_are_found_again(self, tmp_path: Path, save: Save) -> None:
        save("a.png")
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a black dog"}')
        prior = ClassImages(str(tmp_path), "a dog", num_images=2)
        image = examples_of(prior)[1].image
        assert isinstance(image, RenderedImage)
        image.write(torch.zeros(3, 16, 24))
        found = examples_of(prior)
        assert [(type(image.image), image.caption) for image in found] == [
            (ImageFile, "a black dog"),
            (ImageFile, "a dog"),
        ]

    @pytest.mark.parametrize("name", ["nowhere", "."])
    def test_a_folder_without_any(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(InputError, match=r"holds no class images: correct root of the prior, .* num_images"):
            examples_of(ClassImages(str(tmp_path / name), "a dog"))


class TestRenderedImage:
    def test_is_what_was_rendered(self, tmp_path: Path) -> None:
        pixels = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        image = RenderedImage(tmp_path / "class.png", (8, 8), 0)
        image.write(pixels)
        levels = torch.tensor(list(image.read().tobytes())).view(8, 8, 3).permute(2, 0, 1)
        assert (levels / 127.5 - 1 - pixels).abs().max() <= 0.5 / 127.5 + 1e-6

    def test_levels_beyond_the_range_are_cut_off(self, tmp_path: Path) -> None:
        image = RenderedImage(tmp_path / "class.png", (1, 1), 0)
        image.write(torch.tensor([-1.5, 0.0, 1.5])[:, None, None])
        assert image.read().getpixel((0, 0)) == (0, 128, 255)

    def test_is_there_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(self: Image.Image, path: Path, **_: str) -> None:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            RenderedImage(tmp_path / "class.png", (8, 8), 0).write(torch.zeros(3, 8, 8))
        assert list(tmp_path.iterdir()) == []

    def test_noise_follows_from_its_number_and_the_seed_of_the_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PL_GLOBAL_SEED", "5")
        images = [RenderedImage(Path("x.png"), (8, 16), number) for number in (1, 2)]
        assert [image.request("a dog") for image in images] == [
            {"prompt": "a dog", "size": (8, 16), "seed": seed_of(5, number)} for number in (1, 2)
        ]


def test_teacher_sees_the_same_images_under_the_name_of_the_class() -> None:
    instances = [CaptionedImage(ImageFile(Path(name)), name, ImageFile(Path("mask.png"))) for name in ("a", "b")]
    examples = TeacherPrior("a dog", 0.5).examples(instances, (8, 8))
    assert examples == [CaptionedImage(ImageFile(Path(name)), "a dog") for name in ("a", "b")]
    assert TeacherPrior.teacher
    assert not ClassImages.teacher
