import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lit_edm.errors import InputError
from lit_edm.sdxl.formats import read_adapter, write_diffusers, write_embeddings, write_kohya
from lit_edm.sdxl.updates import AdapterWeights, LayerUpdate, LoHaUpdate, LoKrUpdate, LoRAUpdate

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
K = Q.replace("to_q", "to_k")


def some(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


LORA = LoRAUpdate(some(2, 6), some(4, 2), 0.5)
DORA = LoRAUpdate(some(2, 6), some(4, 2), 0.5, some(4).abs())
LOHA = LoHaUpdate(some(4, 3), some(3, 6), some(4, 3), some(3, 6), 2.0)
LOKR = LoKrUpdate((some(2, 2),), (some(2, 3),), 2.0)


def test_diffusers_header_has_peft_settings_of_each_network(tmp_path: Path) -> None:
    texts = {"text_model.encoder.layers.0.mlp.fc1": LORA}
    path = write_diffusers(AdapterWeights({"unet": {Q: DORA}, "text_encoder": texts}), tmp_path / "x.safetensors")
    settings = json.loads(header_of(path)["lora_adapter_metadata"])
    assert settings["unet.r"] == settings["unet.lora_alpha"] == settings["text_encoder.lora_alpha"] == 2
    assert (settings["unet.use_dora"], settings["text_encoder.use_dora"]) == (True, False)
    assert settings["unet.target_modules"] == [Q]
    assert settings["text_encoder.target_modules"] == ["encoder.layers.0.mlp.fc1"]
    assert settings["unet.lora_dropout"] == 0


@pytest.mark.parametrize(
    ("update", "module", "arguments"),
    [
        (LORA, "networks.lora", None),
        (DORA, "lycoris.kohya", {"algo": "locon", "dora_wd": "True", "wd_on_out": "True"}),
        (LOHA, "lycoris.kohya", {"algo": "loha"}),
        (LOKR, "lycoris.kohya", {"algo": "lokr"}),
    ],
)
def test_kohya_header_is_what_programs_show(
    tmp_path: Path, update: LayerUpdate, module: str, arguments: dict[str, str] | None
) -> None:
    weights = AdapterWeights({"unet": {Q: update}}, {}, {"TOK": 2, "HAT": 1})
    header = header_of(write_kohya(weights, tmp_path / "my style.safetensors"))
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert header["ss_output_name"] == header["modelspec.title"] == "my style"
    assert header["ss_network_dim"] == str(update.rank)
    assert header["ss_network_alpha"] == str(update.rank * update.scale)
    assert header["ss_network_module"] == module
    assert json.loads(header.get("ss_network_args", "null")) == arguments
    assert header["modelspec.trigger_phrase"] == "TOK, HAT"


def test_kohya_has_the_alpha_of_most_layers_and_folds_what_is_left(tmp_path: Path) -> None:
    odd = LoRAUpdate(some(3, 6), some(4, 3), 7.0)
    still = LoRAUpdate(some(2, 6), some(4, 2), 0.0)
    same = LoRAUpdate(some(2, 6), some(4, 2), 0.5)
    updates = {Q: LORA, K: same, "mid_block.attentions.0.proj_in": odd, "mid_block.attentions.0.proj_out": still}
    path = write_kohya(AdapterWeights({"unet": updates}), tmp_path / "x.safetensors")
    with safe_open(path, "pt") as file:
        alphas = {file.get_tensor(key).item() for key in file.keys() if key.endswith(".alpha")}  # noqa: SIM118
        assert file.get_tensor(f"lora_unet_{Q.replace('.', '_')}.lora_up.weight").equal(LORA.b)
    assert alphas == {1.0}
    for layer, update in read_adapter(path).networks["unet"].items():
        torch.testing.assert_close(update.product(), updates[layer].product())


def test_an_adapter_that_does_nothing_can_be_written(tmp_path: Path) -> None:
    nothing = AdapterWeights({"unet": {Q: LoRAUpdate(some(2, 6), some(4, 2), 0.0)}})
    for write in (write_diffusers, write_kohya):
        assert not read_adapter(write(nothing, tmp_path / "x.safetensors")).networks["unet"][Q].product().any()


def test_bundled_embeddings_without_known_placeholders_are_called_like_the_file(tmp_path: Path) -> None:
    weights = AdapterWeights({"unet": {Q: LORA}}, {"clip_l": some(2, 32), "clip_g": some(2, 48)})
    path = write_kohya(weights, tmp_path / "icons.v2.safetensors", with_embeddings=True)
    with safe_open(path, "pt") as file:
        assert file.get_tensor("bundle_emb.icons_v2.clip_g").equal(weights.embeddings["clip_g"])


def test_embeddings_say_whose_they_are(tmp_path: Path) -> None:
    weights = AdapterWeights({}, {"clip_l": some(3, 32), "clip_g": some(3, 48)}, {"TOK": 2, "HAT": 1})
    assert read_adapter(write_embeddings(weights, tmp_path / "x.safetensors")).tokens == {"TOK": 2, "HAT": 1}


class WithoutFactors(LayerUpdate):
    rank = 1
    size = (4, 6)
    scale = 1.0

    def product(self) -> Tensor:
        return some(4, 6)


@pytest.mark.parametrize(
    ("updates", "write", "message"),
    [
        ({Q: LOHA}, write_diffusers, f"unet.{Q} is LoHa, which diffusers does not read; write the format kohya"),
        ({Q: LOKR}, write_diffusers, f"unet.{Q} is LoKr, which diffusers does not read"),
        ({Q: LORA, K: DORA}, write_diffusers, "some layers of unet are LoRA and some DoRA"),
        ({Q: WithoutFactors()}, write_kohya, "WithoutFactors is no update that a file can hold"),
    ],
)
def test_what_a_format_cannot_hold_leaves_the_file_there(
    tmp_path: Path, updates: dict[str, LayerUpdate], write: object, message: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("there before")
    with pytest.raises(InputError, match=message):
        write(AdapterWeights({"unet": updates}), path)  # type: ignore[operator]
    assert path.read_text() == "there before"
    assert list(tmp_path.iterdir()) == [path]
