import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from lit_edm.cli import main
from lit_edm.errors import InputError
from lit_edm.modules.convert import convert
from lit_edm.sdxl.formats import LORA_FILE, read_adapter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tiny: Path, icons: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains two steps; returns the run's folder, with last.ckpt and the adapter that SaveAdapter wrote."""

    def fit(*settings: str) -> Path:
        data = ["--data=CaptionedImagesDataModule", f"--data.root={icons}", "--data.resolution=16"]
        model = ["--model=SDXLModule", f"--model.pretrained={tiny}", '--model.tokens={"TOK": 2}']
        quiet = ["accelerator=cpu", "logger=false", "enable_progress_bar=false", "enable_model_summary=false"]
        trainer = [f"--trainer.{s}" for s in ("max_steps=2", f"default_root_dir={tmp_path}", *quiet)]
        save = ["--trainer.callbacks+=SaveAdapter", "--trainer.callbacks.name=x"]
        save += ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path}"]
        save += ["--trainer.callbacks.filename=last", "--trainer.callbacks.every_n_train_steps=2"]
        main(["fit", *data, *model, *trainer, *save, *settings])
        return tmp_path

    return fit


def same_files(first: Path, second: Path) -> bool:
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_checkpoint_gives_the_files_of_the_run(run: Callable[..., Path], tiny: Path, averaged: bool) -> None:
    average = ["--trainer.callbacks+=ExponentialMovingAverage", "--trainer.callbacks.half_life=8"]
    average += [
        "--model.loss=EDMLoss",
        "--model.loss.noise=UniformTimesteps",
        "--model.loss.weighting=LearnedWeighting",
        "--model.loss.weighting.weighting=SNRWeighting",
    ]
    folder = run(*(average if averaged else []))
    written = convert(folder / "last.ckpt", folder / "style", ("diffusers", "kohya"))
    assert written
    assert written.lora == ("unet",)
    assert same_files(folder / "style" / LORA_FILE, folder / "adapter" / LORA_FILE)
    assert same_files(folder / "style" / "style_emb.safetensors", folder / "adapter" / "x_emb.safetensors")
    assert read_adapter(folder / "style").tokens == {"TOK": 2}


def test_formats_become_each_other(run: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    adapter = run("--model.adapter=LoRA", "--model.adapter.rank=2", "--model.adapter.alpha=1") / "adapter"
    convert(adapter, tmp_path / "b", ("bundled",))
    convert(tmp_path / "b" / "b_bundled.safetensors", tmp_path / "c")
    there, back = read_adapter(adapter), read_adapter(tmp_path / "c")
    assert back.tokens == there.tokens
    for name, rows in there.embeddings.items():
        assert back.embeddings[name].equal(rows)
    for layer, update in there.networks["unet"].items():
        torch.testing.assert_close(back.networks["unet"][layer].product(), update.product(), atol=1e-6, rtol=0)


def test_a_base_takes_what_was_trained(run: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    folder = run("--model.text_encoder_adapter=FullFinetune")
    assert convert(folder / "last.ckpt", tmp_path / "merged", base=str(tiny)) is None
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "merged")
    trained = load_file(folder / "adapter" / "text_encoder_2" / "model.safetensors")
    ours = pipe.text_encoder_2.state_dict()
    table = "text_model.embeddings.token_embedding.weight"
    assert ours.pop(table)[:-2].equal(trained.pop(table))
    assert all(ours[name].equal(value) for name, value in trained.items())
    assert pipe.tokenizer.tokenize("<s0><s1>") == ["<s0>", "<s1>"]
    convert(folder / "adapter", tmp_path / "from_file", base=str(tiny))
    other = StableDiffusionXLPipeline.from_pretrained(tmp_path / "from_file").unet.state_dict()
    for name, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(other[name], value)


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04 no zip", b"{}"])
def test_damaged_checkpoints(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(contents)
    with pytest.raises(InputError, match="it is damaged, or no checkpoint of a run of lit-edm"):
        convert(tmp_path / "x.ckpt", tmp_path / "out")
    with pytest.raises(InputError, match="there is no such file"):
        convert(tmp_path / "y.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_other_modules(tmp_path: Path) -> None:
    torch.save({"callbacks": {}, "hyper_parameters": {"_class_path": "lit_edm.modules.EDMModule"}}, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"it is of lit_edm\.modules\.EDMModule; only what an SDXLModule has trained"):
        convert(tmp_path / "x.ckpt", tmp_path / "out")


def test_the_script_tells_what_it_wrote(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("--model.adapter=LoKr")
    script = runpy.run_path(str(ROOT / "scripts/export.py"))["main"]
    script([str(folder / "last.ckpt"), str(tmp_path / "out"), "--precision", "bf16"])
    said = capsys.readouterr().out.splitlines()
    files = ["out_emb.safetensors", "out_lycoris.safetensors"]
    assert said[-3:-1] == [str(tmp_path / "out" / file) for file in files]
    assert said[-1] == "Diffusers does not read the updates of unet; see out_lycoris.safetensors."
    with pytest.raises(SystemExit, match="2"):
        script([str(tmp_path / "nothing.safetensors"), str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert said.startswith(f"export.py: error: {tmp_path / 'nothing.safetensors'}: there is no such file")
