from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_edm.batch import Batch, ClassImageRequest
from lit_edm.cache import MemoryCache
from lit_edm.data import AspectBuckets, CaptionedImagesDataModule, ClassImages, Concept, TeacherPrior
from lit_edm.data.team import Team
from lit_edm.errors import InputError

Save = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, save: Save) -> Callable[..., Path]:
    """Makes a folder of plain images of a size, width first, which their captions name."""

    def make(name: str, count: int, size: tuple[int, int] = (48, 32)) -> Path:
        for number in range(count):
            path = save(f"{name}/{number}.png", Image.new("RGB", size))
            path.with_suffix(".txt").write_text(f"{name} {number}")
        return tmp_path / name

    return make


def set_up(**settings: Any) -> CaptionedImagesDataModule:
    data = CaptionedImagesDataModule(**{"resolution": 32, **settings})
    data.setup("fit")
    return data


def epoch_of(data: CaptionedImagesDataModule) -> list[Batch]:
    return list(data.train_dataloader())


def shown(batches: list[Batch]) -> Counter[str]:
    return Counter(caption for batch in batches for caption in batch["caption"])


def grey(requests: list[ClassImageRequest]) -> Tensor:
    return torch.zeros(len(requests), 3, *requests[0]["size"])


class TestConcepts:
    def test_each_has_its_own_folder_repeats_and_class(self, folder: Callable[..., Path]) -> None:
        data = set_up(
            concepts=[
                Concept(str(folder("dog", 2)), repeats=3, prior=ClassImages(str(folder("other", 4)), "a dog", 0.5)),
                Concept(str(folder("hat", 3)), prior=TeacherPrior("a hat", 0.25)),
            ],
            batch_size=4,
            caption_prefix="TOK: ",
        )
        batches = epoch_of(data)
        counts = shown(batches)
        assert [counts[f"TOK: dog {number}"] for number in range(2)] == [3, 3]
        assert [counts[f"TOK: hat {number}"] for number in range(3)] == [1, 1, 1]
        assert sorted(counts[f"other {number}"] for number in range(4)) == [1, 1, 2, 2], "as many as dogs, evenly"
        assert counts["a hat"] == 3
        weights, teacher = {}, {}
        for batch in batches:
            for row, caption in enumerate(batch["caption"]):
                weights[caption.split()[-2]] = float(batch["weight"][row])
                teacher[caption.split()[-2]] = batch["teacher"][row]
        assert weights == {"dog": 1.0, "hat": 1.0, "other": 0.5, "a": 0.25}
        assert [kind for kind, taught in teacher.items() if taught] == ["a"]

    def test_captions_are_those_of_all(self, folder: Callable[..., Path]) -> None:
        settings = {"caption_prefix": "TOK: ", "caption_dropout": 0.1}
        prior = ClassImages(str(folder("other", 1)), "a dog")
        data = set_up(concepts=[Concept(folder("dog", 2), prior=prior), Concept(folder("hat", 1))], **settings)
        assert data.captions() == ["TOK: dog 0", "", "TOK: dog 1", "other 0", "TOK: hat 0"]

    def test_settings_beside_them_are_refused(self, folder: Callable[..., Path]) -> None:
        with pytest.raises(InputError, match=r"data\.init_args\.repeats is given beside data\.init_args\.concepts"):
            set_up(concepts=[Concept(folder("dog", 1))], repeats=2)
        with pytest.raises(InputError, match=r"data\.init_args\.root is given beside"):
            set_up(concepts=[Concept(folder("dog", 1))], root=folder("hat", 1))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, r"data\.init_args: neither root nor dataset is given"),
            ({"root": "a", "dataset": "b"}, r"data\.init_args: both root and dataset are given"),
            ({"concepts": []}, r"data\.init_args\.concepts is empty"),
            ({"concepts": [Concept("a"), Concept()]}, r"data\.init_args\.concepts\[1\]: neither root nor dataset"),
            ({"concepts": [Concept("a", repeats=0)]}, r"data\.init_args\.concepts\[0\]\.repeats is 0: give at least 1"),
            ({"root": "a", "prior": TeacherPrior("x", -1)}, r"data\.init_args\.prior\.init_args\.weight is -1: give"),
            (
                {"concepts": [Concept("a", prior=ClassImages("b", "x", num_images=-1))]},
                r"data\.init_args\.concepts\[0\]\.prior\.init_args\.num_images is -1: give at least 0",
            ),
        ],
    )
    def test_settings_that_do_not_fit(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            set_up(**settings)

    @pytest.mark.parametrize(
        "concepts",
        [
            [
                Concept("dog", prior=ClassImages("dog/classes", "a dog", num_images=2))
            ],  # trained on from the second run on
            [Concept("dog/mine", prior=ClassImages("dog", "a dog"))],
            [Concept("dog"), Concept("dog/hat")],
            [Concept("hat", prior=ClassImages("dog/../dog/classes", "a hat")), Concept("dog")],
            [
                Concept("hat", prior=ClassImages("dog", "a dog")),
                Concept("cap", prior=ClassImages("dog/puppy", "a puppy", num_images=2)),
            ],
        ],
    )
    def test_folders_within_others_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concepts: list[Concept]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match=rf"{tmp_path}/dog/\w+ lies in {tmp_path}/dog, whose images would include"):
            set_up(concepts=concepts)

    def test_a_folder_is_not_both_of_a_concept_and_of_a_class(self, folder: Callable[..., Path]) -> None:
        root = folder("dog", 2)
        with pytest.raises(InputError, match=rf"{root} is the root both of a concept and of a prior"):
            set_up(root=root, prior=ClassImages(str(root), "a dog"))

    def test_folders_that_others_leave_alone(self, folder: Callable[..., Path], save: Save) -> None:
        """Hidden ones, those of similar names, and the same folder under two captions."""
        save("dog/.classes/0.png")
        prior = ClassImages(str(folder("dog", 2) / ".classes"), "a dog")
        concepts = [Concept(folder("dog", 2), prior=prior), Concept(folder("dog", 2)), Concept(folder("dog_2", 1))]
        assert shown(epoch_of(set_up(concepts=concepts))) == {"dog 0": 2, "dog 1": 2, "a dog": 2, "dog_2 0": 1}

    def test_held_out_images_are_captioned_like_the_first(self, folder: Callable[..., Path], save: Save) -> None:
        save("held/a.png")
        concepts = [Concept(folder("dog", 1), instance_prompt="a TOK"), Concept(folder("hat", 1))]
        (batch,) = set_up(concepts=concepts, val_root=folder("held", 0)).val_dataloader()
        assert batch["caption"] == ["a TOK"]


def test_held_out_images_beside_a_data_set_are_those_of_any_folder(tmp_path: Path, save: Save) -> None:
    """The data set's columns are not looked for in it."""
    picture = {"picture": [str(save("a.png"))], "said": ["red"], "mask": [None]}
    datasets.Dataset.from_dict(picture).cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "rows")
    save("held/b.png")
    columns = {"image_column": "picture", "caption_column": "said", "instance_prompt": "a TOK"}
    (batch,) = set_up(dataset=str(tmp_path / "rows"), val_root=tmp_path / "held", **columns).val_dataloader()
    assert batch["caption"] == ["a TOK"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_sets_are_trained_on_as_folders_are(tmp_path: Path, save: Save, num_workers: int) -> None:
    pictures = [str(save(f"{color}.png", Image.new("RGB", (48, 32), color))) for color in ("red", "blue")]
    rows = datasets.Dataset.from_dict({"picture": pictures, "text": ["red", "blue"]})
    rows.cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "rows")
    for picture in pictures:
        Path(picture).unlink()
    data = set_up(
        dataset=str(tmp_path / "rows"),
        image_column="picture",
        prior=TeacherPrior("a class"),
        batch_size=2,
        repeats=2,
        num_workers=num_workers,
        latent_cache=MemoryCache(),
    )
    assert data.captions() == ["red", "blue", "a class"]
    for key in ("image", "moments"):
        batches = epoch_of(data)
        assert shown(batches) == {"red": 2, "blue": 2, "a class": 4}
        for batch in batches:
            for pixels, caption in zip(batch[key], batch["caption"], strict=True):
                if caption != "a class":
                    assert pixels[:, 0, 0].tolist() == {"red": [1, -1, -1], "blue": [-1, -1, 1]}[caption]
        data.fill_cache(lambda pixels: pixels[..., ::8, ::8], "vae")


class TestPriors:
    @pytest.mark.parametrize("batch_size", [1, 2, 3])
    def test_captions_stay_with_their_images(self, folder: Callable[..., Path], save: Save, batch_size: int) -> None:
        """Pitfalls 3 and 4: one caption, one weight and one size for each image, however they are batched."""
        save("dog/0.png", Image.new("RGB", (48, 32), "red")).with_suffix(".txt").write_text("red")
        save("other/0.png", Image.new("RGB", (40, 64), "blue")).with_suffix(".txt").write_text("blue")
        prior = ClassImages(str(folder("other", 0)), "a dog", weight=0.5)
        data = set_up(root=folder("dog", 0), repeats=4, prior=prior, batch_size=batch_size)
        told = {"red": ([1, -1, -1], [32, 48], [0, 8], 1.0), "blue": ([-1, -1, 1], [64, 40], [9, 0], 0.5)}
        batches = epoch_of(data)
        assert shown(batches) == {"red": 4, "blue": 4}
        for batch in batches:
            for row, caption in enumerate(batch["caption"]):
                colour, size, corner, weight = told[caption]
                assert batch["image"][row, :, 0, 0].tolist() == colour
                assert batch["original_size"][row].tolist() == size, "pitfall 19: its own"
                assert batch["crop_top_left"][row].tolist() == corner
                assert batch["weight"][row] == weight

    def test_teacher_sees_each_image_once_more(self, folder: Callable[..., Path]) -> None:
        data = set_up(root=folder("dog", 3), prior=TeacherPrior("a dog"), batch_size=2, repeats=2)
        assert data.captions() == ["dog 0", "dog 1", "dog 2", "a dog"]
        for batch in epoch_of(data):
            assert sorted(batch["teacher"]) == [False, True]
            assert [caption == "a dog" for caption in batch["caption"]] == batch["teacher"]

    def test_fewer_are_shown_than_there_are(self, folder: Callable[..., Path]) -> None:
        data = set_up(root=folder("dog", 2), prior=ClassImages(str(folder("other", 10)), "a dog"))
        loader, seen = data.train_dataloader(), Counter[str]()
        for epoch in range(12):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            batches = list(loader)
            assert len(batches) == 4
            seen += shown(batches)
        assert sum(seen[f"other {number}"] > 0 for number in range(10)) > 7, "others each time"


class TestRendering:
    def prior(self, tmp_path: Path, count: int = 6) -> ClassImages:
        return ClassImages(str(tmp_path / "classes"), "a dog", num_images=count)

    def test_makes_what_lacks_and_keeps_it(self, folder: Callable[..., Path], tmp_path: Path) -> None:
        data = set_up(root=folder("dog", 3), prior=self.prior(tmp_path), repeats=2)
        asked: list[list[ClassImageRequest]] = []
        data.render_missing(lambda requests: asked.append(requests) or grey(requests))
        assert [len(requests) for requests in asked] == [4, 2]
        assert {(request["prompt"], request["size"]) for requests in asked for request in requests} == {
            ("a dog", (32, 32))
        }
        assert len({request["seed"] for requests in asked for request in requests}) == 6
        assert shown(epoch_of(data))["a dog"] == 6
        assert sorted(path.name for path in (tmp_path / "classes").iterdir()) == [
            f"class_{number:05}.png" for number in range(6)
        ]
        again = set_up(root=tmp_path / "dog", prior=self.prior(tmp_path), repeats=2)
        again.render_missing(lambda requests: pytest.fail("nothing lacks"))
        assert len(again.train_dataloader()) == len(data.train_dataloader())

    def test_goes_on_after_an_interruption(self, folder: Callable[..., Path], tmp_path: Path) -> None:
        def render(requests: list[ClassImageRequest]) -> Tensor:
            if len(requests) == 2:
                raise KeyboardInterrupt
            return grey(requests)

        settings = {"root": folder("dog", 3), "prior": self.prior(tmp_path)}
        with pytest.raises(KeyboardInterrupt):
            set_up(**settings).render_missing(render)
        asked: list[ClassImageRequest] = []
        set_up(**settings).render_missing(lambda requests: asked.extend(requests) or grey(requests))
        assert len(asked) == 2

    def test_is_in_the_squarest_of_shapes(self, folder: Callable[..., Path], tmp_path: Path) -> None:
        data = set_up(root=folder("dog", 2), prior=self.prior(tmp_path), resolution=36, buckets=AspectBuckets(8, 2))
        data.render_missing(grey)
        assert {tuple(b["image"].shape[-2:]) for b in epoch_of(data) if "a dog" in b["caption"]} <= data.sizes()
        assert Image.open(tmp_path / "classes" / "class_00000.png").size in {(32, 40), (40, 32)}

    def test_two_concepts_may_share_them(self, folder: Callable[..., Path], tmp_path: Path) -> None:
        concepts = [Concept(folder(name, 2), prior=self.prior(tmp_path, 3)) for name in ("dog", "puppy")]
        asked: list[ClassImageRequest] = []
        data = set_up(concepts=concepts)
        data.render_missing(lambda requests: asked.extend(requests) or grey(requests))
        assert len(asked) == 3
        assert shown(epoch_of(data))["a dog"] == 4

    def test_that_cannot_be_seen_elsewhere(
        self, folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on the second of two machines without a common folder."""
        data = set_up(root=folder("dog", 1), prior=self.prior(tmp_path))
        monkeypatch.setattr(Team, "share", lambda *_: [])
        with pytest.raises(InputError, match=r"class_00000\.png is not there on every machine"):
            data.render_missing(grey)
