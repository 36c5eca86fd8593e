"""What files call the layers of networks: diffusers' names with dots, kohya's with underscores, the original SDXL's."""

import re

KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
"""What kohya's and LyCORIS' files call the networks that a pipeline has under these names."""

WHOLE_WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "proj_in", "proj_out", "time_emb_proj"),
    *("conv_in", "conv_out", "conv_shortcut", "time_embedding", "add_embedding", "linear_1", "linear_2"),
    *("to_q", "to_k", "to_v", "to_out", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("text_projection", "input_blocks", "middle_block", "output_blocks", "in_layers", "emb_layers", "out_layers"),
    *("skip_connection", "time_embed", "label_emb"),
)
"""The names of modules, in SDXL's UNet and text encoders, that have an underscore themselves; longer ones first."""

ORIGINAL_LAYERS = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
"""What the original SDXL calls the layers of a residual block."""

ORIGINAL_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
"""What the original SDXL calls the layers outside of blocks."""


def kohya_name(network: str, layer: str) -> str:
    """Returns kohya's name of a layer: lora_te1_text_model_encoder_layers_0_self_attn_q_proj."""
    return f"{KOHYA_PREFIXES[network]}_{layer.replace('.', '_')}"


def from_kohya_name(name: str) -> tuple[str, str] | None:
    """Returns network and layer of kohya's name, also where it is the original SDXL's; None if it is no such name."""
    for network, prefix in KOHYA_PREFIXES.items():
        if name.startswith(f"{prefix}_"):
            underscored = name.removeprefix(f"{prefix}_")
            dotted = ".".join(re.findall("|".join((*WHOLE_WORDS, "[^_]+")), underscored))
            return network, from_original_name(dotted)
    return None


def from_original_name(name: str) -> str:
    """Returns the name that diffusers has for a layer of the original SDXL's UNet; others as they are."""
    if name in ORIGINAL_ENDS:
        return ORIGINAL_ENDS[name]
    if match := re.fullmatch(r"middle_block\.(\d)\.(.+)", name):
        part, rest = int(match[1]), match[2]
        block = "mid_block.attentions.0" if part == 1 else f"mid_block.resnets.{part // 2}"
    elif match := re.fullmatch(r"(in|out)put_blocks\.(\d+)\.(\d)\.(.+)", name):
        block, rest = original_block(match[1] == "in", int(match[2]), int(match[3]), match[4]), match[4]
    else:
        return name
    if "samplers" in block:
        return f"{block}.conv"
    return f"{block}.{ORIGINAL_LAYERS.get(rest, rest)}"


def original_block(down: bool, index: int, part: int, rest: str) -> str:
    """Returns the block that is part `part` of the original's input or output block `index`: three of them a level."""
    level, layer = divmod(index - 1 if down else index, 3)
    side = "down" if down else "up"
    if rest in ("op", "conv"):
        return f"{side}_blocks.{level}.{side}samplers.0"
    return f"{side}_blocks.{level}.{'attentions' if part == 1 else 'resnets'}.{layer}"
