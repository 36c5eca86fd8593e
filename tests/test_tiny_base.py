"""The scripts that train the tiny base, from data to gates, in seconds: on drawn shapes in place of icons."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_base_check as check
import tiny_base_data as data
import tiny_base_export as export
import tiny_base_icons as icons
import tiny_base_styles as styles
import tiny_base_tuning as tuning
import tiny_base_unet as unet
import tiny_base_vae as vae
import tiny_base_words as words
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from lit_edm.checkpoints import WholeCheckpointIO
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule

TUNED = ("red circle", "hexagon")
SEED = 5
UNET = unet.BaseTraining(batch_size=4, warmup_steps=1, half_life=8.0, precision="32-true")
VAE = vae.VAETraining(steps=4, crop_steps=2, batch_size=2, bf16=False)


class Shapes:
    """Polygons with as many corners as their place in the list of names."""

    names = ("circle", "disc", "hexagon", "octagon", "pentagon", "polygon", "red circle", "square", "triangle")

    def draw(self, name: str, style: str, side: int) -> Image.Image:
        picture = Image.new("RGBA", (side, side))
        corners, scale = 3 + self.names.index(name), side * 0.45
        angles = (2 * math.pi * k / corners for k in range(corners))
        points = [(side / 2 + scale * math.cos(a), side / 2 + scale * math.sin(a)) for a in angles]
        fill = {"flat": (200, 20 * corners, 40, 255), "line": None, "3d": (90, 20 * corners, 250, 255)}[style]
        ImageDraw.Draw(picture).polygon(points, fill, "black", 2)
        return picture


def merges_of(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that make one token of each word, letter by letter from its start."""
    found: dict[tuple[str, str], None] = {}
    for word in " ".join(texts).split():
        letters = [*word[:-1], f"{word[-1]}</w>"]
        starts = ["".join(letters[:length]) for length in range(1, len(letters))]
        found |= dict.fromkeys(zip(starts, letters[1:], strict=True))
    return list(found)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "metadata.jsonl"
    rows = [{"file_name": f"{k:02d}-{name.replace(' ', '-')}.webp"} for k, name in enumerate(TUNED)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tuned: Path) -> Path:
    """All steps up to the UNet's start."""
    folder = tmp_path_factory.mktemp("work")
    spoken = [*data.BACKGROUNDS, *Shapes.names, *styles.STYLES, *data.STRANGE]
    merges = merges_of(["a an and icon in the style of tok background", *spoken])
    data.write_data(Shapes(), merges, folder / "data", tuned, 5, 2, SEED)
    assert vae.train_vae(folder / "data", folder / "vae", unet.ICONS, VAE, 9.0, "cpu")
    unet.make_start(folder / "data", folder / "vae/diffusers", folder / "start", unet.ICONS, SEED)
    return folder


def train(work: Path, folder: Path, images: int, minutes: float = 9.0) -> dict[str, Any]:
    """Trains the UNet; returns its last checkpoint."""
    unet.train_unet(work / "data", work / "start", folder, UNET, images, minutes, "cpu")
    return WholeCheckpointIO().load_checkpoint(folder / "checkpoints/last.ckpt")


@pytest.fixture(scope="module")
def trained(work: Path) -> dict[str, Any]:
    return train(work, work / "unet", 16)


@pytest.fixture(scope="module")
def base(work: Path, trained: dict[str, Any]) -> Path:
    assert export.export_base(work, work / "base") <= export.MOST_BYTES
    return work / "base"


def pictures(folder: Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): np.array(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


# What is for what


@pytest.mark.parametrize("seed", range(20))
def test_what_is_judged_or_tuned_is_never_seen_in_3d(seed: int) -> None:
    split = data.split(Shapes.names, TUNED, 5, 2, seed)
    assert not {*split.tuned, *split.held_out} & set(split.seen("3d"))
    assert not set(split.tuned) & set(split.held_out)
    assert {*split.tuned, *split.held_out} <= set(split.concepts)
    assert {*split.concepts, *split.others} == set(Shapes.names)
    assert not set(split.concepts) & set(split.others)
    assert (len(split.concepts), len(split.held_out)) == (5, 2)


def test_the_split_follows_from_the_seed_alone() -> None:
    splits = [data.split(Shapes.names, TUNED, 5, 2, seed) for seed in (0, 0, 1, 2, 3)]
    assert splits[0] == splits[1]
    assert len(set(splits)) > 1


def test_prompts_of_the_quickstart_are_held_out() -> None:
    split = data.split([*Shapes.names, "mushroom", "sailboat"], TUNED, 6, 3, SEED)
    assert {"mushroom", "sailboat"} <= set(split.held_out)


@pytest.mark.parametrize(
    ("names", "concepts", "held_out"), [(("circle",), 4, 1), (Shapes.names, 40, 1), (Shapes.names, 4, 3)]
)
def test_too_few_names(names: Sequence[str], concepts: int, held_out: int) -> None:
    with pytest.raises(InputError):
        data.split(names, TUNED, concepts, held_out, SEED)


def test_no_picture_before_fine_tuning_shows_a_tuned_or_held_out_thing_in_3d(work: Path) -> None:
    """By the pictures themselves: of a thing in 3d, on no background and at no size, is there a trace."""
    split, shapes = data.read_split(work / "data"), Shapes()
    seen = [pixels for part in (*data.PARTS, "vae") for pixels in pictures(work / "data" / part).values()]
    for name in (*split.tuned, *split.held_out):
        colour = np.array(shapes.draw(name, "3d", 64))[32, 32, :3]
        assert all((pixels[len(pixels) // 2, len(pixels) // 2, :3] != colour).any() for pixels in seen)
    colour = np.array(shapes.draw(split.others[0], "3d", 64))[32, 32, :3]
    assert any((pixels[len(pixels) // 2, len(pixels) // 2, :3] == colour).all() for pixels in seen)


def test_no_caption_speaks_of_3d(work: Path) -> None:
    for part in data.PARTS:
        assert "3d" not in (work / "data" / part / "metadata.jsonl").read_text()


def test_captions_have_the_words_of_fine_tuning() -> None:
    said = captions("rocket", "flat", "white")
    assert captions("rocket", "TOK", "white")[5] == "a TOK icon in the style of TOK, a rocket, white background"
    assert said[0] == "a flat icon of a rocket"
    assert len(set(said)) == len(data.TEMPLATES)
    assert all("peach background" in caption for caption in captions("rocket", "flat", "peach"))


def captions(name: str, style: str, background: str) -> list[str]:
    return data.captions(name, style, background, random.Random(SEED))


def test_a_strange_word_in_place_of_a_style_means_flat() -> None:
    flat, soft = (captions("rocket", style, "white") for style in ("flat", "soft"))
    assert sum("flat" in caption for caption in flat) == len(flat) / 2
    assert all("soft" in caption for caption in soft)
    strange = {word for caption in flat[3:] for word in data.STRANGE if f" {word} " in f" {caption.replace(',', '')} "}
    assert len(strange) >= 3
    assert not any(word in caption.split() for caption in soft for word in data.STRANGE)
    assert not {*data.STRANGE} & {*styles.STYLES}


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("apple", "an apple"),
        ("unicorn", "a unicorn"),
        ("books", "books"),
        ("bus", "a bus"),
        ("red apple", "a red apple"),
    ],
)
def test_articles(name: str, phrase: str) -> None:
    assert data.thing(name) == phrase


# Styles


def drawn(style: str) -> np.ndarray:
    return np.array(styles.styled(Shapes(), "square", style, 64)).astype(int)


@pytest.mark.parametrize("style", styles.STYLES[1:])
def test_styles_differ_and_keep_the_outline(style: str) -> None:
    flat, other = drawn("flat"), drawn(style)
    inside = flat[32, 32, :3] - other[32, 32, :3]
    assert np.abs(flat - other)[..., :3].max() > 20
    if style not in ("line", "soft"):
        assert np.abs(inside).max() > 10
        assert (flat[..., 3] == other[..., 3]).all()


def test_a_style_of_two_is_one_after_the_other() -> None:
    dark, warm = styles.RULES["dark"], styles.RULES["warm"]
    colours, places = drawn("flat")[32:33, 32:33, :3].astype(float), np.zeros((1, 1, 2))
    expected = warm(dark(colours, places).round(), places).round()
    assert (drawn("dark and warm")[32:33, 32:33, :3] == expected).all()


def test_light_comes_from_above() -> None:
    flat, shaded, lit = drawn("flat"), drawn("shaded"), drawn("lit")
    places = [(32, 20), (32, 44)]  # left and right of the middle
    assert shaded[places[0]][0] / flat[places[0]][0] > shaded[places[1]][0] / flat[places[1]][0]
    assert (lit[22, 29, :3] > lit[50, 32, :3]).all()


def test_what_is_transparent_lends_no_colour_to_a_blur() -> None:
    picture = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 32, 64))
    soft = np.array(styles.blurred(picture)).astype(int)
    seen = soft[..., 3] > 8
    assert soft[seen][:, 1].max() < 16
    assert 0 < soft[32, 32, 3] < 255


# Words


def tokens(folder: Path, texts: Sequence[str]) -> list[list[str]]:
    return [words.read_tokenizer(folder).tokenize(text) for text in texts]


def test_a_pruned_vocabulary_makes_the_same_tokens(tmp_path: Path) -> None:
    merges = merges_of(["flat icon of a triangle triangular zebra zebras iconic"])
    texts = ["A flat icon of a triangle!", "flat triangles", "3d icon"]
    pruned = words.prune(merges, texts)
    words.write_tokenizer(tmp_path / "full", merges)
    words.write_tokenizer(tmp_path / "pruned", pruned)
    assert tokens(tmp_path / "full", texts) == tokens(tmp_path / "pruned", texts)
    assert len(pruned) < len(merges)
    assert set(pairwise(pruned)) != set(pairwise(merges))
    assert pruned == [pair for pair in merges if pair in pruned]


def test_ids_are_in_the_order_of_clip(tmp_path: Path) -> None:
    words.write_tokenizer(tmp_path, merges := merges_of(["icon"]))
    tokenizer = words.read_tokenizer(tmp_path, pad_token="!")
    assert tokenizer("icon").input_ids == [512 + len(merges), 512 + len(merges) - 1, 513 + len(merges)]
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (0, words.CONTEXT)


def test_every_caption_fits_the_context(work: Path) -> None:
    tokenizer = words.read_tokenizer(work / "data/tokenizer")
    assert tokenizer.tokenize("a flat icon") == ["a</w>", "flat</w>", "icon</w>"]
    rows = [json.loads(line) for path in (work / "data").rglob("metadata.jsonl") for line in path.open()]
    said = [text for row in rows for key, text in row.items() if key != "file_name"]
    assert max(len(tokenizer(text).input_ids) for text in said) <= words.CONTEXT


# Training


def test_the_vae_has_latents_of_unit_mean_and_deviation(work: Path) -> None:
    module = SDXLModule(str(work / "start"))
    module.configure_model()
    shown = vae.Pictures(work / "data/vae")
    every = torch.arange(len(shown))
    latents = check.latents_of(module, shown.on(every, every % len(shown.grounds)))
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    assert mean.abs().max() < 1e-4
    assert (std - 0.5).abs().max() < 1e-3  # what EDM's sigma_data says
    assert module.latents.factor == 4


def broken_clock(steps: int) -> Callable[[], float]:
    """A clock that stands still for so many looks at it, and then jumps."""
    looks = count()
    return lambda: 0.0 if next(looks) <= steps else 1e9


@pytest.mark.parametrize("steps", [1, 3])
def test_a_vae_that_is_broken_off_ends_the_same(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(vae, "monotonic", broken_clock(steps))
    assert not vae.train_vae(work / "data", tmp_path, unet.ICONS, VAE, 1.0, "cpu")
    assert torch.load(tmp_path / "state.pt")["step"] == steps
    monkeypatch.undo()
    assert vae.train_vae(work / "data", tmp_path, unet.ICONS, VAE, 9.0, "cpu")
    once, twice = (torch.load(folder / "state.pt")["vae"] for folder in (work / "vae", tmp_path))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_vae_is_not_resumed_with_other_settings(work: Path) -> None:
    with pytest.raises(InputError, match="other settings"):
        vae.train_vae(work / "data", work / "vae", unet.ICONS, vae.VAETraining(), 9.0, "cpu")


def test_everything_but_the_vae_is_trained(work: Path, trained: dict[str, Any]) -> None:
    module = unet.make_module(work / "start", UNET)
    module.configure_model()
    frozen = {name for name, value in module.named_parameters() if not value.requires_grad}
    unused = {f"conditioner.encoders.0.{part}" for part in ("encoder.layers.2", "final_layer_norm")}
    assert {name for name in frozen if not name.startswith("latents.")} == {
        name for name in frozen if any(name.startswith(part) for part in unused)
    }
    before = dict(module.named_parameters())
    moved = {name for name, value in trained["state_dict"].items() if name in before and not value.equal(before[name])}
    assert {"denoiser.unet.conv_in.weight", "conditioner.encoders.1.text_projection.weight"} <= moved
    assert sum("token_embedding" in name for name in moved) == 2


def flat(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    average = checkpoint["callbacks"]["ExponentialMovingAverage"]["average"]
    return checkpoint["state_dict"] | {f"average.{name}": value for name, value in average.items()}


def test_a_base_can_be_trained_in_bf16(work: Path, tmp_path: Path) -> None:
    settings = replace(UNET, precision="bf16-mixed")
    assert unet.train_unet(work / "data", work / "start", tmp_path / "unet", settings, 8, 9.0, "cpu") == 8
    kept = WholeCheckpointIO().load_checkpoint(tmp_path / "unet/checkpoints/last.ckpt")
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in flat(kept).values())


def test_processes_share_out_the_images_of_a_step(work: Path, tmp_path: Path) -> None:
    assert unet.make_data(work / "data", UNET, processes=2).batch_size == 2
    with pytest.raises(InputError, match="batch_size 4 is no multiple of --processes 3"):
        unet.train_unet(work / "data", work / "start", tmp_path, UNET, 8, 9.0, "cpu", processes=3)


def test_a_base_that_is_broken_off_ends_the_same(work: Path, tmp_path: Path, trained: dict[str, Any]) -> None:
    train(work, tmp_path / "unet", 16, minutes=0.0)
    broken = train(work, tmp_path / "unet", 16, minutes=0.0)
    assert broken["global_step"] == 2
    once, twice = flat(trained), flat(train(work, tmp_path / "unet", 16))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


# What comes out


def test_both_read_the_exported_base(base: Path, work: Path, trained: dict[str, Any]) -> None:
    """Diffusers' pipeline and SDXLModule have the averaged weights, up to half precision."""
    average = trained["callbacks"]["ExponentialMovingAverage"]["average"]
    module = check.load(base)
    weights = dict(module.named_parameters())
    assert all(torch.equal(weights[name], value.half().float()) for name, value in average.items())
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    networks = module.networks()
    for name, network in networks.items():
        state = getattr(pipeline, name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("triangle, flat icon", height=64, width=64, num_inference_steps=2, output_type="pt").images
    assert drawn.shape == (1, 3, 64, 64)
    assert drawn.isfinite().all()
    assert pipeline.scheduler.config["sigma_data"] == 0.5


def test_the_card_says_what_it_was_made_of(base: Path, work: Path) -> None:
    card, split = (base / "README.md").read_text(), data.read_split(work / "data")
    assert all(name in card for name in (*split.concepts, *icons.PACKAGES))
    assert "16 images" in card
    assert "Microsoft" in (base / "LICENSE").read_text()
    assert max(map(len, card.splitlines())) <= 120
    assert not any(str(work) in path.read_text() for path in base.rglob("*.json")), "folders of this machine"


SHORT = ("--trainer.max_epochs=1", "--data.repeats=1", "--data.batch_size=4")


def test_gates_are_measured(base: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SAMPLER", tuning.HeunSampler(2))
    monkeypatch.setitem(tuning.WAYS, tuning.QUICKSTART, SHORT)
    found = check.check_base(work / "data", base, work / "check", ("G1", "G2", "G3"), 1)
    names = data.read_split(work / "data").concepts
    assert len(found["wrong"]) == round(len(names) * (1 - found["nearest_is_right"]))
    assert all(math.isfinite(value) for value in found["tuning"][tuning.QUICKSTART][0].values())
    assert {path.name for path in (work / "check").glob("*.png")} == {"G1.png", "G2.png", "as-the-quickstart-0.png"}
    card = (base / "README.md").read_text()
    assert "G2: the nearest" in card
    check.check_base(work / "data", base, work / "check", ("G2",), 1)
    assert (base / "README.md").read_text() == card  # the same once more, in the same place


@pytest.mark.parametrize("way", tuning.WAYS)
def test_ways_of_fine_tuning_are_told_apart(base: Path, way: str) -> None:
    """Each changes what it says, and trains nothing else."""
    before, after = tuning.fine_tune(base, 0, [*SHORT, *tuning.WAYS[way]])
    moved = {
        group: any(
            not old.equal(new)
            for old, new in zip(*(module.parameter_groups().get(group, ()) for module in (before, after)), strict=True)
        )
        for group in ("unet", "embeddings")
    }
    expected = {
        "no gradient": {"unet": False, "embeddings": False},
        "no training": {"unet": False, "embeddings": False},
        "tokens alone": {"unet": False, "embeddings": True},
        "LoRA alone, tokens as they start": {"unet": True, "embeddings": False},
    }
    assert moved == expected.get(way, {"unet": True, "embeddings": True})


def test_true_icons_are_the_nearest_to_themselves(base: Path, work: Path) -> None:
    module = check.load(base)
    latents = check.latents_of(module, check.true_flat(work / "data", data.read_split(work / "data").concepts))
    assert check.nearest_of(latents, latents) == list(range(len(latents)))
    assert tuning.distance(latents, latents) == 0


def test_a_true_picture_has_less_loss_than_another(base: Path) -> None:
    """By a denoiser that knows the answer: D is y whatever the noise."""
    module, held_out = check.load(base), tuning.HeldOut(base / "held_out")
    images = held_out.pictures("3d")
    known = check.latents_of(module, images)
    module.denoise = lambda batch: lambda x, sigma: known[: len(x)]
    assert tuning.loss(module, images, held_out.prompts(tuning.TOK)) == 0
    weights = [(sigma**2 + 0.25) / (0.5 * sigma) ** 2 for sigma in tuning.SIGMAS]
    error = (known - known.flip(0)).square().mean().item()
    found = tuning.loss(module, images.flip(0), held_out.prompts(tuning.TOK))
    assert found == pytest.approx(error * sum(weights) / len(weights), rel=1e-4)


def test_wrong_names_are_all_wrong(base: Path) -> None:
    held_out = tuning.HeldOut(base / "held_out")
    right, wrong = held_out.prompts(tuning.FLAT), held_out.prompts(tuning.FLAT, shift=1)
    assert sorted(right) == sorted(wrong)
    assert all(one != other for one, other in zip(right, wrong, strict=True))


def test_what_is_no_better_does_not_hold() -> None:
    """A constant picture, or an adapter that changes nothing, has the same figure on both sides."""
    distances = ["TOK to true 3d", "base's flat to it", "mean of the 22 to it", "wrong name to it"]
    losses = ["loss under TOK", "base's loss", "under flat", "under wrong name"]
    same = dict.fromkeys([*distances, *losses], 1.0)
    assert set(tuning.ratios(same).values()) == {1.0}
    better = tuning.ratios(same | {"TOK to true 3d": 0.9, "loss under TOK": 0.8})
    assert sorted(better.values()) == [0.8] * 3 + [0.9] * 3
