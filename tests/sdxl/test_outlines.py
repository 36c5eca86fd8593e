from pathlib import Path

import pytest
import torch
from torch import nn

from lit_edm.errors import InputError
from lit_edm.sdxl import FromFile, FullFinetune, LoRA, SDXLCheckpoint
from lit_edm.sdxl.formats import write_embeddings, write_kohya
from lit_edm.sdxl.injection import weights_of
from lit_edm.sdxl.outlines import check_text_encoders, check_unet, check_weights, text_encoder, text_encoder_2, unet
from lit_edm.sdxl.updates import AdapterWeights, LoRAUpdate

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


def test_are_the_networks_without_values(tiny: Path) -> None:
    checkpoint = SDXLCheckpoint(str(tiny))
    first, second = checkpoint.load_text_encoders(torch.float32)
    pairs = (
        (unet(checkpoint), checkpoint.load_unet(torch.float32)),
        (text_encoder(checkpoint), first),
        (text_encoder_2(checkpoint), second),
    )
    for made, loaded in pairs:
        assert type(made) is type(loaded)
        assert shapes(made) == shapes(loaded)
        assert all(parameter.is_meta for parameter in made.parameters())


def test_what_fits_passes(tiny: Path, tmp_path: Path) -> None:
    checkpoint = SDXLCheckpoint(str(tiny))
    network = checkpoint.load_unet(torch.float32)
    LoRA(rank=2)(network)
    rows = {"clip_l": torch.zeros(2, 32), "clip_g": torch.zeros(2, 48)}
    weights = weights_of({"unet": network}, rows, {"TOK": 2})
    file = str(write_kohya(weights, tmp_path / "x.safetensors"))
    embeddings = str(write_embeddings(weights, tmp_path / "e.safetensors"))
    for adapter in (LoRA(), FullFinetune(("mid_block",)), FromFile(file)):
        check_unet(checkpoint, adapter)
    check_text_encoders(checkpoint, LoRA(blocks=("*.self_attn",)), 0, embeddings, 2)
    check_weights(checkpoint, weights, file)


def test_what_does_not_fit_is_refused(tiny: Path, tmp_path: Path) -> None:
    checkpoint = SDXLCheckpoint(str(tiny))
    other = AdapterWeights({"unet": {LAYER: LoRAUpdate(torch.zeros(2, 640), torch.zeros(640, 2))}})
    file = str(write_kohya(other, tmp_path / "x.safetensors"))
    with pytest.raises(InputError, match=r"adapter\.init_args\.blocks: nowhere is no layer"):
        check_unet(checkpoint, LoRA(blocks=("nowhere",)))
    with pytest.raises(InputError, match=r"adapter\.init_args\.path: .* is for another base: .* 640 x 640"):
        check_unet(checkpoint, FromFile(file))
    with pytest.raises(InputError, match=r"^here is for another base: .* 640 x 640"):
        check_weights(checkpoint, other, "here")
    with pytest.raises(InputError, match=r"text_encoder_adapter\.init_args\.blocks: mid_block is no layer"):
        check_text_encoders(checkpoint, LoRA(blocks=("mid_block",)), 0, None, 0)
    rows = AdapterWeights({}, {"clip_l": torch.zeros(2, 32), "clip_g": torch.zeros(2, 40)}, {"TOK": 2})
    embeddings = str(write_embeddings(rows, tmp_path / "e.safetensors"))
    with pytest.raises(InputError, match=r"init_args\.embeddings: .*: clip_g is \(2, 40\), but .* want \(2, 48\)"):
        check_text_encoders(checkpoint, None, 0, embeddings, 2)


def test_draw_nothing(tiny: Path) -> None:
    before = torch.get_rng_state()
    check_unet(SDXLCheckpoint(str(tiny)), LoRA())
    check_text_encoders(SDXLCheckpoint(str(tiny)), LoRA(), 0, None, 0)
    assert torch.get_rng_state().equal(before)
