import pytest
from torch import nn

from lit_edm.errors import InputError
from lit_edm.sdxl.layers import adapter_key, chosen, matches

NAMES = ["conv_in", "down_blocks.1.attentions.0.proj_in", "up_blocks.0.attentions.0.proj_in", "up_blocks.0.conv"]


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("conv_in", ["conv_in"]),
        ("conv", []),  # neither the beginning nor the end of a name
        ("up_blocks.0", NAMES[2:]),
        ("*.attentions.0", NAMES[1:3]),
        ("*_blocks.?.conv", NAMES[3:]),
        ("content", NAMES[2:3]),
        ("style", []),
    ],
)
def test_a_pattern_means_a_layer_or_a_block(pattern: str, meant: list[str]) -> None:
    assert [name for name in NAMES if matches(name, pattern)] == meant


def test_one_pattern_serves_both_text_encoders() -> None:
    for name in ("encoder.layers.1.mlp", "text_model.encoder.layers.1.mlp"):
        for pattern in ("encoder.layers.1", "text_model.encoder.layers.1", "*.mlp"):
            assert matches(name, pattern)
        assert not matches(name, "encoder.layers.11")


def test_chosen_keeps_the_order_of_the_network() -> None:
    assert chosen(NAMES, ["up_blocks.0.conv", "conv_in"], "key") == ["conv_in", "up_blocks.0.conv"]
    assert chosen(NAMES, [], "key") == NAMES
    with pytest.raises(
        InputError, match=r"^a.blocks: up_blocks.9 is no layer that could be trained; .* conv_in to up_"
    ):
        chosen(NAMES, ["conv_in", "up_blocks.9"], "a.blocks")


def test_the_key_names_the_adapter_of_the_network() -> None:
    assert adapter_key(nn.Identity()) == "model.init_args.adapter"
    encoder = nn.Identity()
    encoder.get_input_embeddings = lambda: None  # type: ignore[assignment]
    assert adapter_key(encoder) == "model.init_args.text_encoder_adapter"
