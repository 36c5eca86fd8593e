import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from lit_edm.errors import InputError
from lit_edm.sdxl import DoRA, LoRA, SDXLCheckpoint
from lit_edm.sdxl.formats import LORA_FILE, read_adapter, write_diffusers, write_embeddings, write_kohya
from lit_edm.sdxl.injection import weights_of
from lit_edm.sdxl.updates import AdapterWeights, LoRAUpdate

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
OLD_Q = Q.replace("to_q", "processor.to_q_lora")
ORIGINAL_Q = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
KOHYA_Q = f"lora_unet_{Q.replace('.', '_')}"


def some(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def saved(path: Path, tensors: dict[str, Tensor], **header: str) -> Path:
    save_file(tensors, path, header)
    return path


def product_of(path: Path, layer: str = Q) -> Tensor:
    return read_adapter(path).networks["unet"][layer].product()


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (f"unet.{Q}.lora_A.weight", f"unet.{Q}.lora_B.weight"),
        (f"unet.{Q}.lora.down.weight", f"unet.{Q}.lora.up.weight"),
        (f"unet.{OLD_Q}.down.weight", f"unet.{OLD_Q}.up.weight"),
        (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"),
        (f"{KOHYA_Q}.lora_down.weight", f"{KOHYA_Q}.lora_up.weight"),
        (f"{ORIGINAL_Q}.lora_down.weight", f"{ORIGINAL_Q}.lora_up.weight"),
    ],
)
def test_every_way_to_write_a_lora(tmp_path: Path, down: str, up: str) -> None:
    a, b = some(2, 6), some(4, 2)
    torch.testing.assert_close(product_of(saved(tmp_path / "x.safetensors", {down: a, up: b})), b @ a)


def test_output_projections_of_2023(tmp_path: Path) -> None:
    name = f"unet.{Q.replace('to_q', 'processor.to_out_lora')}"
    path = saved(tmp_path / "x.safetensors", {f"{name}.down.weight": some(2, 6), f"{name}.up.weight": some(4, 2)})
    assert set(read_adapter(path).networks["unet"]) == {Q.replace("to_q", "to_out.0")}


@pytest.mark.parametrize("name", ["text_model.encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.q_proj"])
@pytest.mark.parametrize("kind", ["lora_A lora_B", "lora_linear_layer.down lora_linear_layer.up"])
def test_text_encoders_with_and_without_the_prefix_of_old(tmp_path: Path, name: str, kind: str) -> None:
    down, up = (f"text_encoder.{name}.{factor}.weight" for factor in kind.split())
    weights = read_adapter(saved(tmp_path / "x.safetensors", {down: some(2, 6), up: some(4, 2)}))
    assert list(weights.networks["text_encoder"]) == ["text_model.encoder.layers.0.self_attn.q_proj"]


def test_scale_is_alpha_over_rank(tmp_path: Path) -> None:
    a, b = some(4, 6), some(3, 4)
    tensors = {f"{KOHYA_Q}.lora_down.weight": a, f"{KOHYA_Q}.lora_up.weight": b, f"{KOHYA_Q}.alpha": torch.tensor(1.0)}
    torch.testing.assert_close(product_of(saved(tmp_path / "x.safetensors", tensors)), b @ a / 4)


@pytest.mark.parametrize(
    "adapter",
    [
        LoRA(rank=4, alpha=1.0, ranks={"up_blocks": 2}, alphas={"mid_block": 8.0}),
        LoRA(rank=4, alpha=3.0, rank_stabilized=True),
        DoRA(rank=2, alpha=6.0),
    ],
    ids=str,
)
def test_scales_that_diffusers_writes_in_the_header(tiny: Path, tmp_path: Path, adapter: Any) -> None:
    checkpoint = SDXLCheckpoint(str(tiny))
    unet, (text_encoder, _) = checkpoint.load_unet(torch.float32), checkpoint.load_text_encoders(torch.float32)
    networks = {"unet": unet, "text_encoder": text_encoder}
    for network in networks.values():
        (adapter if network is unet else LoRA(rank=3, alpha=9.0))(network)
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        text_encoder_lora_layers=get_peft_model_state_dict(text_encoder),
        **_collate_lora_metadata({"unet": unet, "text_encoder": text_encoder}),
    )
    theirs, ours = read_adapter(tmp_path), weights_of(networks)
    for network, updates in ours.networks.items():
        assert theirs.networks[network].keys() == updates.keys()
        for layer, update in updates.items():
            read = theirs.networks[network][layer]
            assert isinstance(read, LoRAUpdate)
            assert isinstance(update, LoRAUpdate)
            torch.testing.assert_close(read.product(), update.product(), atol=1e-6, rtol=0)
            torch.testing.assert_close(read.magnitude, update.magnitude)


def test_a_core_between_the_factors_of_a_convolution(tmp_path: Path) -> None:
    down, mid, up = some(2, 3, 1, 1), some(2, 2, 3, 3), some(5, 2, 1, 1)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    factors = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    path = saved(tmp_path / "x.safetensors", {f"{name}.{key}.weight": value for key, value in factors.items()})
    x = some(1, 3, 6, 6)
    expected = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up)
    weight = product_of(path, "down_blocks.0.resnets.0.conv1").reshape(5, 3, 3, 3)
    torch.testing.assert_close(torch.conv2d(x, weight, padding=1), expected)


@pytest.mark.parametrize("kind", ["hada", "lokr"])
def test_tucker_cores_of_lycoris(tmp_path: Path, kind: str) -> None:
    core, out, into = some(2, 2, 3, 3), some(2, 4), some(2, 5)
    kernels = torch.einsum("ijkl,jr,ip->prkl", core, into, out).contiguous()
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    if kind == "hada":
        tensors = {f"{name}.hada_w{n}_{x}": v.clone() for n in (1, 2) for x, v in (("a", out), ("b", into))}
        tensors |= {f"{name}.hada_t1": core, f"{name}.hada_t2": core.clone()}
        expected = kernels.square().flatten(1)
    else:
        tensors = {f"{name}.lokr_w1": some(2, 3), f"{name}.lokr_t2": core}
        tensors |= {f"{name}.lokr_w2_a": out, f"{name}.lokr_w2_b": into}
        expected = torch.kron(some(2, 3)[..., None, None], kernels).reshape(8, -1)
    path = saved(tmp_path / "x.safetensors", tensors)
    torch.testing.assert_close(product_of(path, "down_blocks.0.resnets.0.conv1"), expected)


def test_alpha_means_nothing_to_lokr_of_full_matrices(tmp_path: Path) -> None:
    factors = {"lokr_w1": some(2, 2), "lokr_w2": some(3, 3), "alpha": torch.tensor(7.0)}
    path = saved(tmp_path / "x.safetensors", {f"{KOHYA_Q}.{name}": factor for name, factor in factors.items()})
    torch.testing.assert_close(product_of(path), torch.kron(some(2, 2), some(3, 3)))


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_embeddings_of_one_row_or_more(tmp_path: Path, names: tuple[str, str]) -> None:
    path = saved(tmp_path / "x.safetensors", {names[0]: some(32), names[1]: some(1, 48)})
    weights = read_adapter(path)
    assert weights.embeddings["clip_l"].equal(some(32)[None])
    assert weights.embeddings["clip_g"].equal(some(1, 48))
    assert not weights.networks
    assert not weights.tokens


def test_bundled_embeddings_are_joined_in_the_order_of_the_header(tmp_path: Path) -> None:
    embeddings = {"clip_l": some(3, 32), "clip_g": some(3, 48)}
    weights = AdapterWeights({"unet": {Q: LoRAUpdate(some(2, 6), some(4, 2))}}, embeddings, {"zebra": 2, "ape v1.5": 1})
    read = read_adapter(write_kohya(weights, tmp_path / "x.safetensors", with_embeddings=True))
    assert all(read.embeddings[name].equal(rows) for name, rows in embeddings.items())
    assert read.tokens == {"zebra": 2, "ape v1_5": 1}
    tensors = {f"bundle_emb.{word}.{name}": rows for word in ("b", "a") for name, rows in embeddings.items()}
    foreign = read_adapter(saved(tmp_path / "y.safetensors", {name: rows.clone() for name, rows in tensors.items()}))
    assert foreign.tokens == {"a": 3, "b": 3}


class TestFolder:
    def test_of_each_network_the_first_file_counts(self, tmp_path: Path) -> None:
        lora = {"unet": {Q: LoRAUpdate(some(2, 6), some(4, 2), 3.0)}}
        texts = {"text_encoder": {"text_model.encoder.layers.0.mlp.fc1": LoRAUpdate(some(1, 6), some(4, 1))}}
        write_diffusers(AdapterWeights(lora), tmp_path / LORA_FILE)
        others = {"unet": {Q: LoRAUpdate(some(1, 6), some(4, 1))}} | texts
        write_kohya(AdapterWeights(others), tmp_path / "a.safetensors")
        tokens = AdapterWeights({}, {"clip_l": some(2, 32), "clip_g": some(2, 48)}, {"TOK": 2})
        write_embeddings(tokens, tmp_path / "b_emb.safetensors")
        weights = read_adapter(tmp_path)
        assert weights.networks.keys() == {"unet", "text_encoder"}
        torch.testing.assert_close(weights.networks["unet"][Q].product(), lora["unet"][Q].product())
        assert weights.tokens == {"TOK": 2}
        assert weights.embeddings["clip_g"].equal(some(2, 48))

    def test_without_files(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"there is no \.safetensors file in this folder"):
            read_adapter(tmp_path)


LORA = {f"{KOHYA_Q}.lora_down.weight": some(2, 6), f"{KOHYA_Q}.lora_up.weight": some(4, 2)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (LORA | {"lora_te_text_model_x.alpha": some(1)}, "lora_te_text_model_x.alpha is no part of an SDXL adapter"),
        (LORA | {f"{KOHYA_Q}.diff_b": some(1)}, f"{KOHYA_Q}.diff_b is no part of an SDXL adapter"),
        ({f"{KOHYA_Q}.lora_down.weight": some(2, 6)}, f"unet.{Q}: 'lora_up.weight' is missing"),
        (LORA | {f"{KOHYA_Q}.lora_up.weight": some(4, 3)}, r"factors of shapes \(2, 6\), \(4, 3\) do not fit"),
        (LORA | {f"{KOHYA_Q}.lora_mid.weight": some(2, 2)}, r"factors of shapes \(2, 2\) and \(2, 6\) do not fit"),
        (
            LORA | {f"{KOHYA_Q}.dora_scale": some(1, 6)},
            r"magnitude has the shape \(1, 6\); one value a row, 4",
        ),
        ({f"{KOHYA_Q}.lokr_w1": some(2, 2), f"{KOHYA_Q}.dora_scale": some(4, 1)}, "is known of LoRA alone"),
        ({"clip_l": some(2, 32)}, r"as many rows clip_l as clip_g, but it has {'clip_l': \(2, 32\)}"),
        ({"clip_l": some(2, 32), "clip_g": some(1, 48)}, "must have as many rows"),
    ],
)
def test_says_in_one_line_what_is_not_understood(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    path = saved(tmp_path / "x.safetensors", tensors)
    with pytest.raises(InputError, match=message) as raised:
        read_adapter(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_pissa_of_others_needs_the_base_that_it_changed(tmp_path: Path) -> None:
    header = {"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": "pissa_niter_4", "unet.lora_alpha": 2})}
    with pytest.raises(InputError, match="its header says that pissa has taken a part out of the base"):
        read_adapter(saved(tmp_path / "x.safetensors", LORA, **header))


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_truncated_files(tmp_path: Path, kept: int) -> None:
    path = saved(tmp_path / "x.safetensors", LORA)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="no safetensors file, or a damaged one") as raised:
        read_adapter(path)
    assert "\n" not in str(raised.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_adapter(tmp_path / "x.safetensors")
