from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from lit_edm.cache import DiskCache, MemoryCache
from lit_edm.sdxl import LoRA, Placeholders, SDXLCheckpoint, SDXLConditioner

CPU = torch.device("cpu")
CAPTIONS = ["a photo of TOK, a red apple", "TOK", "", "a very long caption " * 8]
TIME_IDS = torch.tensor([[1023, 3000, 1, 3, 1024, 1024]] * len(CAPTIONS))


def make(tiny: Path, counts: dict[str, int] | None = None, **settings: Any) -> SDXLConditioner:
    return SDXLConditioner(SDXLCheckpoint(str(tiny)), Placeholders(counts or {}), {}, **settings)


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
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_equals_encode_prompt(tiny: Path, counts: dict[str, int], pool_at_end: bool, clip_skip: int) -> None:
    conditioner = make(tiny, counts, pool_at_end=pool_at_end, clip_skip=clip_skip)
    pipe = pipeline_with(tiny, conditioner, pool_at_end)
    texts = [conditioner.placeholders.replace(caption) for caption in CAPTIONS]
    context, _, pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, clip_skip=clip_skip)
    ours = conditioner(CAPTIONS, TIME_IDS)
    torch.testing.assert_close(ours.context, context, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pooled, pooled, rtol=0, atol=1e-5)
    assert ours.context.shape == (4, 77, 80)
    assert ours.pooled.shape == (4, 48)


def test_pooled_embedding_is_taken_at_the_end_of_text(tiny: Path) -> None:
    conditioner = make(tiny, {"TOK": 2})
    _, pooled = conditioner.encode(["a photo of <s0><s1> today"], CPU)
    ids = conditioner.tokenizers[1]("a photo of <s0><s1> today").input_ids
    end = len(ids) - 1
    assert ids[end] == conditioner.tokenizers[1].eos_token_id == 513
    assert max(ids) == 515  # where the rule of SDXL's config would pool
    encoder = conditioner.encoders[1]
    padded = torch.tensor([ids + [0] * (77 - len(ids))])
    states = encoder.text_model.final_layer_norm(encoder(padded, output_hidden_states=True).hidden_states[-1])
    torch.testing.assert_close(pooled, encoder.text_projection(states[:, end]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(pooled, encoder.text_projection(states[:, ids.index(515)]))


def test_time_ids_stay_exact_in_half_precision(tiny: Path) -> None:
    conditioner = make(tiny, dtype=torch.bfloat16)
    ours = conditioner(CAPTIONS, TIME_IDS)
    assert ours.context.dtype == torch.bfloat16
    assert ours.time_ids.dtype == torch.float32
    assert ours.time_ids.equal(TIME_IDS.float())


def test_unconditional_is_what_the_pipeline_contrasts_with(tiny: Path) -> None:
    conditioner = make(tiny)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny)
    for zeros in (True, False):
        conditioner.zeros_for_empty_prompt = zeros
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
        _, context, _, pooled = pipe.encode_prompt("x", do_classifier_free_guidance=True)
        ours = conditioner.unconditional(TIME_IDS[:1])
        torch.testing.assert_close(ours.context, context)
        torch.testing.assert_close(ours.pooled, pooled)
        assert ours.time_ids.equal(TIME_IDS[:1].float())


def test_dropped_captions_are_what_guidance_contrasts_with(tiny: Path) -> None:
    conditioner = make(tiny, {"TOK": 1})
    captions = ["a TOK", "", "b"]
    for zeros in (True, False):
        conditioner.zeros_for_empty_prompt = zeros
        ours, plain = conditioner.with_dropped(captions, TIME_IDS[:3]), conditioner(captions, TIME_IDS[:3])
        contrast = conditioner.unconditional(TIME_IDS[:3])
        for mine, encoded, empty in zip(ours[:2], plain[:2], contrast[:2], strict=True):
            torch.testing.assert_close(mine[1], empty[1])
            assert mine[::2].equal(encoded[::2])
        assert ours.time_ids.equal(plain.time_ids)


def test_gradients_reach_the_new_rows_alone(tiny: Path) -> None:
    conditioner = make(tiny, {"TOK": 2})
    context, pooled, _ = conditioner(["TOK"], TIME_IDS[:1])
    (context.square().sum() + pooled.square().sum()).backward()
    moved = {name for name, p in conditioner.named_parameters() if p.grad is not None}
    assert moved == {
        "encoders.0.embeddings.token_embedding.rows",
        "encoders.1.text_model.embeddings.token_embedding.rows",
    }


def watched(conditioner: SDXLConditioner) -> list[list[str]]:
    """Notes the texts that the encoders run on, from now on."""
    asked: list[list[str]] = []
    encode = conditioner.encode

    def noting(texts: list[str], device: torch.device) -> Any:
        asked.append(list(texts))
        return encode(texts, device)

    conditioner.encode = noting  # type: ignore[method-assign]
    return asked


class TestAdapter:
    @pytest.mark.parametrize("clip_skip", [0, 1])
    def test_every_trained_value_gets_a_gradient(self, tiny: Path, clip_skip: int) -> None:
        """Layers of the first encoder behind the hidden state that is used would get none, which breaks DDP."""
        conditioner = make(tiny, {"TOK": 1}, adapter=LoRA(rank=2), clip_skip=clip_skip)
        for name, parameter in conditioner.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        context, pooled, _ = conditioner(["a TOK"], TIME_IDS[:1])
        (context.square().sum() + pooled.square().sum()).backward()
        trained = conditioner.adapter_parameters()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
        of_first = [
            name for name, p in conditioner.encoders[0].named_parameters() if p.requires_grad and "lora" in name
        ]
        of_second = [
            name for name, p in conditioner.encoders[1].named_parameters() if p.requires_grad and "lora" in name
        ]
        assert len(of_first) == (2 - 1 - clip_skip) * 4 * 2
        assert len(of_second) == 2 * 4 * 2
        assert not {id(p) for p in conditioner.new_embeddings().values()} & {id(p) for p in trained}

    def test_untouched_is_what_the_base_says(self, tiny: Path) -> None:
        conditioner, base = make(tiny, adapter=LoRA(rank=2)), make(tiny)
        for parameter in conditioner.adapter_parameters():
            torch.nn.init.normal_(parameter)
        ours, theirs = conditioner.untouched(CAPTIONS, TIME_IDS), base(CAPTIONS, TIME_IDS)
        for a, b, trained in zip(ours, theirs, conditioner(CAPTIONS, TIME_IDS), strict=True):
            assert a.equal(b)
            assert not a.requires_grad
            assert trained.equal(b) == (trained.shape[1:] == (6,))


class TestCache:
    def test_frozen_encoders_read_each_text_once(self, tiny: Path) -> None:
        plain, caching = make(tiny), make(tiny, cache=MemoryCache())
        asked = watched(caching)
        caching.keep(CAPTIONS, CPU)
        for _ in range(2):
            for ours, theirs in zip(caching(CAPTIONS, TIME_IDS), plain(CAPTIONS, TIME_IDS), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert asked == [CAPTIONS]

    def test_nothing_is_kept_while_tokens_learn(self, tiny: Path) -> None:
        conditioner = make(tiny, {"TOK": 1}, cache=MemoryCache())
        first = conditioner(["TOK"], TIME_IDS[:1])
        assert first.context.requires_grad
        with torch.no_grad():
            for rows in conditioner.new_embeddings().values():
                rows += 1
        assert not conditioner(["TOK"], TIME_IDS[:1]).context.equal(first.context)

    def test_after_learning_texts_are_kept_as_they_were_learned(self, tiny: Path) -> None:
        conditioner = make(tiny, {"TOK": 1}, cache=MemoryCache())
        learned = conditioner(["TOK"], TIME_IDS[:1])
        conditioner.learning = False
        conditioner.keep(["TOK"], CPU)
        asked = watched(conditioner)
        kept = conditioner(["TOK"], TIME_IDS[:1])
        assert asked == []
        assert kept.context.equal(learned.context)
        assert not kept.context.requires_grad

    def test_validation_reads_the_weights_as_they_are(self, tiny: Path) -> None:
        """They may be averages on loan, which is no reason to train with their texts, nor to validate with others."""
        conditioner = make(tiny, {"TOK": 1}, cache=MemoryCache())
        conditioner.learning = False
        conditioner.keep(["TOK"], CPU)
        trained_with = conditioner(["TOK"], TIME_IDS[:1]).context
        with torch.no_grad():
            for rows in conditioner.new_embeddings().values():
                rows += 1
        assert conditioner(["TOK"], TIME_IDS[:1]).context.equal(trained_with)
        conditioner.eval()
        assert not conditioner(["TOK"], TIME_IDS[:1]).context.equal(trained_with)

    def test_learning_again_forgets(self, tiny: Path) -> None:
        conditioner = make(tiny, {"TOK": 1}, cache=MemoryCache())
        conditioner.learning = False
        conditioner.keep(["TOK"], CPU)
        before = conditioner(["TOK"], TIME_IDS[:1]).context
        conditioner.learning = True
        with torch.no_grad():
            for rows in conditioner.new_embeddings().values():
                rows += 1
        conditioner.learning = False
        assert not conditioner(["TOK"], TIME_IDS[:1]).context.equal(before)

    def test_on_disk_other_weights_and_settings_have_files_of_their_own(
        self, tiny: Path, tiny_v: Path, tmp_path: Path
    ) -> None:
        cache = DiskCache(str(tmp_path / "texts"))
        counts = []
        for base, settings in ((tiny, {}), (tiny, {}), (tiny, {"clip_skip": 1}), (tiny, {"pool_at_end": False})):
            make(base, cache=cache, **settings).keep(["a", "b"], CPU)
            counts.append(len(list(tmp_path.rglob("*.safetensors"))))
        assert counts == [2, 2, 4, 6]

    def test_teacher_and_frozen_encoders_share_what_is_kept(self, tiny: Path) -> None:
        conditioner = make(tiny, cache=MemoryCache())
        asked = watched(conditioner)
        conditioner.keep(["a"], CPU)
        frozen, taught = conditioner(["a"], TIME_IDS[:1]), conditioner.untouched(["a"], TIME_IDS[:1])
        assert frozen.context.equal(taught.context)
        assert asked == [["a"]]

    def test_texts_that_are_not_kept_have_no_gradient_either(self, tiny: Path) -> None:
        for cache in (None, MemoryCache()):
            conditioner = make(tiny, {"TOK": 1}, cache=cache)
            conditioner.learning = False
            context, pooled, _ = conditioner(["TOK, of tags that were shuffled"], TIME_IDS[:1])
            assert not context.requires_grad
            assert not pooled.requires_grad
