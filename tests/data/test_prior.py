from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_edm.data.folder import CaptionedImage
from lit_edm.data.images import ImageFile
from lit_edm.data.prior import ClassImages, TeacherPrior
from lit_edm.data.rendered import RenderedImage
from lit_edm.errors import InputError

Save = Callable[..., Path]


def examples_of(prior: ClassImages) -> list[CaptionedImage]:
    return prior.examples([], (16, 24))


def write(example: CaptionedImage, prompt: str) -> None:
    assert isinstance(example.image, RenderedImage)
    example.image.write(torch.zeros(3, *example.image.size()), example.image.request(prompt))


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
        assert [(Path(image.image.name).name, isinstance(image.image, RenderedImage)) for image in found] == [
            ("a.png", False),
            ("class_00000.png", True),
            ("class_00001.png", False),
            ("class_00002.png", True),
        ]
        assert {image.caption for image in found} == {"a dog"}
        assert len(examples_of(ClassImages(str(tmp_path), "a dog", num_images=1))) == 2, "none is left out"

    def test_are_rendered_into_a_new_folder(self, tmp_path: Path) -> None:
        prior = ClassImages(str(tmp_path / "new" / "folder"), "a dog", num_images=3)
        images = [image.image for image in examples_of(prior)]
        assert [image.size() for image in images] == [(16, 24)] * 3
        for image in images:
            image.check()
            assert isinstance(image, RenderedImage)
            image.write(torch.zeros(3, 16, 24), image.request("a dog"))
        again = [image.image for image in examples_of(prior)]
        assert [image.name for image in again] == [image.name for image in images]
        assert not any(isinstance(image, RenderedImage) for image in again)

    def test_are_in_the_same_order_whichever_run_rendered_them(self, tmp_path: Path, save: Save) -> None:
        save("z.png")
        prior = ClassImages(str(tmp_path), "a dog", num_images=4)
        first = examples_of(prior)
        for example in first[:3]:
            write(example, "a dog")
        assert [example.image.name for example in examples_of(prior)] == [example.image.name for example in first]

    @pytest.mark.parametrize(
        ("prior", "size", "said"),
        [
            (("a cat",), (16, 24), r"prompt 'a dog', but the prior now asks for 'a cat'"),
            (("a dog",), (32, 32), r"size \[16, 24\], but the prior now asks for \[32, 32\]"),
        ],
    )
    def test_rendered_for_another_prior_are_refused(
        self, tmp_path: Path, prior: tuple[str], size: tuple[int, int], said: str
    ) -> None:
        write(examples_of(ClassImages(str(tmp_path), "a dog", num_images=1))[0], "a dog")
        with pytest.raises(InputError, match=rf"class_00000\.png was rendered with {said}: delete it and its like, or"):
            ClassImages(str(tmp_path), *prior, num_images=1).examples([], size)
        assert ClassImages(str(tmp_path), *prior).examples([], size), "taken as they are where none are rendered"

    def test_that_were_rendered_beside_metadata_are_found_again(
        self, tmp_path: Path, save: Save, caplog: pytest.LogCaptureFixture
    ) -> None:
        save("a.png")
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a black dog"}')
        prior = ClassImages(str(tmp_path), "a dog", num_images=2)
        write(examples_of(prior)[1], "a dog")
        found = examples_of(prior)
        assert [(type(image.image), image.caption) for image in found] == [
            (ImageFile, "a black dog"),
            (ImageFile, "a dog"),
        ]
        assert not caplog.records, "they are not left out"
        save("b.png")
        examples_of(prior)
        assert f"1 image(s) without a row in {tmp_path / 'metadata.jsonl'} left out" in caplog.text

    @pytest.mark.parametrize("name", ["nowhere", "."])
    def test_a_folder_without_any(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(InputError, match=r"holds no class images: correct root of the prior, .* num_images"):
            examples_of(ClassImages(str(tmp_path / name), "a dog"))

    def test_a_folder_of_hidden_ones(self, tmp_path: Path, save: Save) -> None:
        """As file managers leave behind."""
        save("._a.png")
        save(".thumbnails/a.png")
        assert len(examples_of(ClassImages(str(tmp_path), "a dog", num_images=1))) == 1


def test_teacher_sees_the_same_images_under_the_name_of_the_class() -> None:
    instances = [CaptionedImage(ImageFile(Path(name)), name, ImageFile(Path("mask.png"))) for name in ("a", "b")]
    examples = TeacherPrior("a dog", 0.5).examples(instances, (8, 8))
    assert examples == [CaptionedImage(ImageFile(Path(name)), "a dog") for name in ("a", "b")]
    assert TeacherPrior.teacher
    assert not ClassImages.teacher
