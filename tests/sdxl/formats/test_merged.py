from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from lit_edm.errors import InputError
from lit_edm.sdxl import FullFinetune, SDXLCheckpoint
from lit_edm.sdxl.formats import write_merged
from lit_edm.sdxl.updates import AdapterWeights, LoRAUpdate

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def some(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


UPDATE = LoRAUpdate(some(2, 32), some(32, 2), 0.5)
ROWS = {"clip_l": some(3, 32), "clip_g": some(3, 48)}


def weights_in(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_adds_the_update_to_its_layer_alone(tiny: Path, tmp_path: Path) -> None:
    before = weights_in(SDXLCheckpoint(str(tiny)).load_unet(torch.float32))
    folder = write_merged(SDXLCheckpoint(str(tiny)), AdapterWeights({"unet": {Q: UPDATE}}), tmp_path / "merged")
    after = weights_in(StableDiffusionXLPipeline.from_pretrained(folder).unet)
    torch.testing.assert_close(after.pop(f"{Q}.weight") - before.pop(f"{Q}.weight"), UPDATE.product())
    assert all(value.equal(before[name]) for name, value in after.items())
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("pool_at_end", [True, False])
def test_knows_the_tokens(tiny: Path, tmp_path: Path, pool_at_end: bool) -> None:
    weights = AdapterWeights({}, ROWS, {"TOK": 2, "HAT": 1})
    folder = write_merged(SDXLCheckpoint(str(tiny)), weights, tmp_path / "merged", pool_at_end=pool_at_end)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    for suffix, name in (("", "clip_l"), ("_2", "clip_g")):
        tokenizer, encoder = getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, f"text_encoder{suffix}")
        ids = tokenizer("<s0><s1> a <s2>", add_special_tokens=False).input_ids
        assert encoder.get_input_embeddings().weight[[ids[0], ids[1], ids[-1]]].equal(ROWS[name])
    expected = pipe.tokenizer_2.eos_token_id if pool_at_end else 2
    assert pipe.text_encoder_2.config.eos_token_id == expected


def test_without_placeholders_all_rows_are_tokens(tiny: Path, tmp_path: Path) -> None:
    folder = write_merged(SDXLCheckpoint(str(tiny)), AdapterWeights({}, ROWS), tmp_path / "merged")
    assert {"<s0>", "<s1>", "<s2>"} <= SDXLCheckpoint(str(folder)).load_tokenizers()[1].get_vocab().keys()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision(tiny: Path, tmp_path: Path, precision: Any, dtype: torch.dtype) -> None:
    adapter = AdapterWeights({"unet": {Q: UPDATE}}, ROWS)
    folder = write_merged(SDXLCheckpoint(str(tiny)), adapter, tmp_path / "merged", precision)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=dtype)
    exact = write_merged(SDXLCheckpoint(str(tiny)), adapter, tmp_path / "exact")
    for name, part in StableDiffusionXLPipeline.from_pretrained(exact).components.items():
        if isinstance(part, nn.Module):
            rounded = getattr(pipe, name).state_dict()
            assert all(rounded[key].equal(value.to(rounded[key].dtype)) for key, value in part.state_dict().items())
            assert {value.dtype for value in rounded.values() if value.is_floating_point()} == {dtype}


def test_another_vae_comes_along(tiny: Path, tiny_edm: Path, tmp_path: Path) -> None:
    base = SDXLCheckpoint(str(tiny), vae=str(tiny_edm / "vae"))
    folder = write_merged(base, AdapterWeights({"unet": {Q: UPDATE}}), tmp_path / "merged")
    assert SDXLCheckpoint(str(folder)).vae_config()["latents_mean"] == base.vae_config()["latents_mean"]


def test_networks_trained_whole_take_the_place_of_the_base(tiny: Path, tmp_path: Path) -> None:
    unet = SDXLCheckpoint(str(tiny)).load_unet(torch.float32)
    FullFinetune()(unet)
    for parameter in unet.parameters():
        parameter.data += 1
    folder = write_merged(SDXLCheckpoint(str(tiny)), AdapterWeights({}), tmp_path / "merged", whole={"unet": unet})
    merged = weights_in(StableDiffusionXLPipeline.from_pretrained(folder).unet)
    assert all(merged[name].equal(value) for name, value in unet.state_dict().items())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"unet": {Q: LoRAUpdate(some(2, 5), some(32, 2))}}, f"another base: its update of {Q} is 32 x 5, but 32 x 32"),
        ({"unet": {"x.to_q": UPDATE}}, "the adapter updates x.to_q, which the base does not have"),
        ({}, r"embeddings clip_l are \(1, 7\), but the base wants \(1, 32\)"),
    ],
)
def test_refuses_what_does_not_fit_and_writes_nothing(
    tiny: Path, tmp_path: Path, weights: dict[str, Any], message: str
) -> None:
    rows = {} if weights else {"clip_l": some(1, 7), "clip_g": some(1, 48)}
    with pytest.raises(InputError, match=message):
        write_merged(SDXLCheckpoint(str(tiny)), AdapterWeights(weights, rows), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_leaves_what_is_there(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("there before")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="there is something already"):
            write_merged(SDXLCheckpoint(str(tiny)), AdapterWeights({}), folder)
    assert (tmp_path / "file").read_text() == "there before"


def test_an_interrupted_write_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(StableDiffusionXLPipeline, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_merged(SDXLCheckpoint(str(tiny)), AdapterWeights({}), tmp_path / "merged")
    assert not list(tmp_path.iterdir())
