"""Every picture is on disk, says how it came about, and stays in its folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from lit_edm.batch import PictureRequest
from lit_edm.callbacks import SavePictures
from lit_edm.callbacks.picture_info import parameters
from lit_edm.callbacks.sheet import MARGIN, TEXT_HEIGHT, contact_sheet, to_pictures
from lit_edm.data import PromptsDataModule
from lit_edm.edm import EulerSampler
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.modules.generation import Generation

GENERATION = Generation(sampler=EulerSampler(2), guidance_scale=3.0, negative_prompt="blur, “fog”")


def module_of(tiny: Path) -> SDXLModule:
    return SDXLModule(str(tiny), adapter=None, generation=GENERATION)


def test_pictures_and_what_they_say(tiny: Path, tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    data = PromptsDataModule(["A red apple!", "Ein Schloß, nachts"], seeds=(5, 6), height=16, width=24, batch_size=3)
    predictions: Any = trainer(SavePictures()).predict(module_of(tiny), data)
    pictures = to_pictures(torch.cat(predictions))
    names = ["a-red-apple", "ein-schlo-nachts"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        *(f"{index:05d}_{names[index % 2]}.png" for index in range(4)),
        "sheet_00.png",
    ]
    for request, expected in zip(data.requests(), pictures, strict=True):
        with Image.open(tmp_path / "pictures" / f"{request['index']:05d}_{names[request['index'] % 2]}.png") as written:
            assert np.array_equal(np.asarray(written), np.asarray(expected))
            said, lines = json.loads(written.text["lit_edm"]), written.text["parameters"].splitlines()  # type: ignore[attr-defined]
        assert said.items() >= {**request, "size": [16, 24]}.items()
        assert said["sampler"] == "EulerSampler(num_steps=2, rho=7.0)"
        assert said["pretrained"] == str(tiny)
        assert lines[:2] == [request["prompt"], "Negative prompt: blur, “fog”"]
        assert (
            f'Steps: 2, Sampler: "EulerSampler(num_steps=2, rho=7.0)", CFG scale: 3.0, Seed: {request["seed"]}'
            in lines[2]
        )
        assert "Size: 24x16" in lines[2]


def test_what_it_says_renders_it_again(tiny: Path, tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    trainer(SavePictures()).predict(module_of(tiny), PromptsDataModule(["a", "b"], seeds=(1, 9), height=16, width=16))
    with Image.open(tmp_path / "pictures" / "00003_b.png") as written:
        pixels, said = np.asarray(written), json.loads(written.text["lit_edm"])  # type: ignore[attr-defined]
    again = SDXLModule(
        said["pretrained"],
        adapter=None,
        generation=Generation(
            sampler=eval(said["sampler"], {"EulerSampler": EulerSampler}),
            guidance_scale=said["guidance_scale"],
            negative_prompt=said["negative_prompt"],
        ),
    )
    again.configure_model()
    assert np.abs(np.asarray(to_pictures(again.render([said]))[0]).astype(int) - pixels).max() <= 1


@pytest.mark.parametrize("prompt", ["../../x", "/etc/passwd", "a\\b:c*?", "..", "", "雪の城", "x" * 400, "a\x00b\n"])
def test_no_prompt_leaves_the_folder(prompt: str, tmp_path: Path) -> None:
    writer = SavePictures()
    writer.folder = tmp_path
    request = PictureRequest(index=7, prompt=prompt, size=(8, 8), seed=0, scale=1.0)
    path = writer.path(request)
    path.write_bytes(b"")
    assert path.resolve().parent == tmp_path.resolve()
    assert path.name.startswith("00007")
    assert len(path.name) < 60


def test_sheets_have_a_prompt_a_column_and_a_seed_and_scale_a_row(tmp_path: Path) -> None:
    writer = SavePictures(columns=2, side=32)
    writer.folder = tmp_path
    data = PromptsDataModule(["a", "b", "c"], seeds=(0, 1), adapter_scales=(0.5, 1.0), height=16, width=32)
    data.setup("predict")
    for request in data.requests():
        level = 20 * request["index"]
        Image.new("RGB", (32, 16), (level, level, level)).save(writer.path(request))
    first, second = writer.sheets(data.requests())
    cell, row = 32 + MARGIN, 32 + MARGIN + TEXT_HEIGHT
    assert (first.width, second.width) == (MARGIN + 2 * cell, MARGIN + cell)
    for sheet, prompts in ((first, (0, 1)), (second, (2,))):
        for column, prompt in enumerate(prompts):
            for number in range(4):
                x, y = MARGIN + column * cell, MARGIN + TEXT_HEIGHT + number * row + TEXT_HEIGHT
                assert sheet.getpixel((x + 16, y + 8)) == (20 * (3 * number + prompt),) * 3
                assert sheet.getpixel((x + 16, y + 20)) == (255, 255, 255), "in its own proportions"


def test_no_sheets(tiny: Path, tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    data = PromptsDataModule(["a"], height=16, width=16)
    trainer(SavePictures(folder="here", columns=0)).predict(module_of(tiny), data)
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["00000_a.png"]


def test_two_processes_write_all_pictures_once(tiny: Path, tmp_path: Path, trainer: Callable[..., Trainer]) -> None:
    """The same as one process writes, to the bit."""
    prompts = {"prompts": ["a", "b", "c"], "seeds": (0, 1), "height": 16, "width": 16, "batch_size": 2}
    for name, processes in (("one", {}), ("two", {"strategy": "ddp_fork", "devices": 2})):
        run = trainer(SavePictures(), default_root_dir=tmp_path / name, **processes)
        run.predict(module_of(tiny), PromptsDataModule(**prompts), return_predictions=False)  # type: ignore[arg-type]
    one, two = (sorted((tmp_path / name / "pictures").iterdir()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) == 7
    assert all(path.read_bytes() == other.read_bytes() for path, other in zip(one, two, strict=True))


def test_values_that_would_be_taken_for_several_are_quoted() -> None:
    settings = {**GENERATION.described(), "pretrained": "a, b", "adapters": [{"path": "x.safetensors", "scale": 0.5}]}
    request = PictureRequest(index=0, prompt="p", size=(8, 16), seed=1, scale=0.5)
    line = parameters(request, settings).splitlines()[-1]
    assert 'Model: "a, b", Adapters: "x.safetensors:0.25"' in line
    assert "Guidance interval" not in line


@pytest.mark.parametrize("settings", [{"folder": "a/b"}, {"folder": ""}, {"columns": -1}, {"side": 0}])
def test_mistakes(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="SavePictures"):
        SavePictures(**settings)


def test_pictures_of_other_shapes_keep_them_on_a_sheet() -> None:
    tall = Image.new("RGB", (10, 40), "black")
    sheet = contact_sheet({"": [tall]}, [""], side=20)
    black = (np.asarray(sheet) == 0).all(axis=2)
    rows, columns = (np.flatnonzero(black.any(axis=axis)) for axis in (1, 0))
    assert (len(rows), len(columns)) == (20, 5)
