from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from lit_edm.sdxl import Placeholders, SDXLCheckpoint, SDXLConditioner

CAPTIONS = ["a photo of TOK, a red apple", "TOK", "", "a very long caption " * 8]
TIME_IDS = torch.tensor([[1023, 3000, 1, 3, 1024, 1024]] * len(CAPTIONS))


def pipeline_with(tiny: Path, conditioner: SDXLConditioner, pool_at_end: bool) -> StableDiffusionXLPipeline:
    """A fresh pipeline that got the new tokens from files, as users of diffusers do it."""
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny)
    names = conditioner.placeholders.names
    for name, rows in conditioner.new_embeddings().items():
        encoder, tokenizer = (
            (pipe.text_encoder, pipe.tokenizer) if name == "clip_l" else (pipe.text_encoder_2, pipe.tokenizer_2)
        )
        pipe.load_textual_inversion(rows.detach(), token=names, text_encoder=encoder, tokenizer=tokenizer)
    if pool_at_end:
        pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    return pipe


@pytest.mark.parametrize("pool_at_end", [True, False])
@pytest.mark.parametrize("counts", [{}, {"TOK": 2}])
def test_equals_encode_prompt(tiny: Path, counts: dict[str, int], pool_at_end: bool) -> None:
    conditioner = SDXLConditioner(SDXLCheckpoint(str(tiny)), Placeholders(counts), {}, pool_at_end)
    pipe = pipeline_with(tiny, conditioner, pool_at_end)
    texts = [conditioner.placeholders.replace(caption) for caption in CAPTIONS]
    context, _, pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
    ours = conditioner(CAPTIONS, TIME_IDS)
    torch.testing.assert_close(ours.context, context, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pooled, pooled, rtol=0, atol=1e-5)
    assert ours.context.shape == (4, 77, 80)
    assert ours.pooled.shape == (4, 48)


def test_pooled_embedding_is_taken_at_the_end_of_text(tiny: Path) -> None:
    conditioner = SDXLConditioner(SDXLCheckpoint(str(tiny)), Placeholders({"TOK": 2}), {})
    output = conditioner.encode(1, ["a photo of TOK today"])
    ids = conditioner.tokenizers[1]("a photo of <s0><s1> today").input_ids
    end = len(ids) - 1
    assert ids[end] == conditioner.tokenizers[1].eos_token_id == 513
    assert max(ids) == 515  # where the rule of SDXL's config would pool
    encoder = conditioner.encoders[1]
    states = encoder.text_model.final_layer_norm(output.hidden_states[-1])
    torch.testing.assert_close(output.text_embeds, encoder.text_projection(states[:, end]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(output.text_embeds, encoder.text_projection(states[:, ids.index(515)]))


def test_time_ids_stay_exact_in_half_precision(tiny: Path) -> None:
    conditioner = SDXLConditioner(SDXLCheckpoint(str(tiny)), Placeholders({}), {}, dtype=torch.bfloat16)
    ours = conditioner(CAPTIONS, TIME_IDS)
    assert ours.context.dtype == torch.bfloat16
    assert ours.time_ids.dtype == torch.float32
    assert ours.time_ids.equal(TIME_IDS.float())


def test_unconditional_is_what_the_pipeline_contrasts_with(tiny: Path) -> None:
    conditioner = SDXLConditioner(SDXLCheckpoint(str(tiny)), Placeholders({}), {})
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny)
    for zeros in (True, False):
        conditioner.zeros_for_empty_prompt = zeros
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
        _, context, _, pooled = pipe.encode_prompt("x", do_classifier_free_guidance=True)
        ours = conditioner.unconditional(TIME_IDS[:1])
        torch.testing.assert_close(ours.context, context)
        torch.testing.assert_close(ours.pooled, pooled)
        assert ours.time_ids.equal(TIME_IDS[:1].float())


def test_gradients_reach_the_new_rows_alone(tiny: Path) -> None:
    conditioner = SDXLConditioner(SDXLCheckpoint(str(tiny)), Placeholders({"TOK": 2}), {})
    context, pooled, _ = conditioner(["TOK"], TIME_IDS[:1])
    (context.square().sum() + pooled.square().sum()).backward()
    moved = {name for name, p in conditioner.named_parameters() if p.grad is not None}
    assert moved == {
        "encoders.0.embeddings.token_embedding.rows",
        "encoders.1.text_model.embeddings.token_embedding.rows",
    }
