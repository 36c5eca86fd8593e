import runpy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_edm.errors import InputError
from lit_edm.sdxl import DoRA, LoCon, LoHa, LoKr, LoRA, SDXLCheckpoint
from lit_edm.sdxl.formats import LORA_FILE, read_adapter, write_diffusers, write_embeddings, write_kohya
from lit_edm.sdxl.injection import weights_of
from lit_edm.sdxl.merge import Merge
from lit_edm.sdxl.merge_files import card, merge_files
from lit_edm.sdxl.updates import AdapterWeights

SCRIPT = Path(__file__).parents[2] / "scripts/merge.py"
PROMPT = "a 3d icon of {}, a red apple"


def trained(base: Path, adapter: Any, seed: int, tokens: int = 0, texts: bool = False) -> AdapterWeights:
    """An adapter far from where it starts."""
    checkpoint = SDXLCheckpoint(str(base))
    first, second = checkpoint.load_text_encoders(torch.float32)
    networks: dict[str, nn.Module] = {"unet": checkpoint.load_unet(torch.float32)}
    networks |= {"text_encoder": first, "text_encoder_2": second} if texts else {}
    generator = torch.Generator().manual_seed(seed)
    for network in networks.values():
        adapter(network)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    rows = {name: torch.randn(tokens, width, generator=generator) for name, width in (("clip_l", 32), ("clip_g", 48))}
    return weights_of(networks, rows if tokens else None, {"TOK": tokens} if tokens else None)


def layers(path: Path | str) -> dict[str, Tensor]:
    """Products of a file's LoRA for diffusers, by layer."""
    tensors = load_file(path)
    names = {key.rsplit(".lora_", 1)[0] for key in tensors}
    return {
        name: (tensors[f"{name}.lora_B.weight"].flatten(1) @ tensors[f"{name}.lora_A.weight"].flatten(1))
        for name in names
    }


def rendered(pipe: StableDiffusionXLPipeline, word: str) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 3, "height": 16, "width": 16, "latents": noise, "output_type": "pt"}
    return pipe(PROMPT.format(word), **settings).images


def with_tokens(base: Path, embeddings: Mapping[str, Tensor], names: list[str]) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    for key, encoder, tokenizer in (("clip_l", "", ""), ("clip_g", "_2", "_2")):
        parts = {
            "text_encoder": getattr(pipe, f"text_encoder{encoder}"),
            "tokenizer": getattr(pipe, f"tokenizer{tokenizer}"),
        }
        pipe.load_textual_inversion({key: embeddings[key]}[key], token=names, **parts)
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    return pipe


def untouched(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_formats_and_ranks_mix(tiny: Path, tmp_path: Path) -> None:
    first, second = trained(tiny, LoRA(rank=3, alpha=6.0), 0), trained(tiny, LoCon(rank=2, conv_rank=4), 1, texts=True)
    write_diffusers(first, tmp_path / "a" / LORA_FILE)
    write_kohya(second, tmp_path / "b.safetensors")
    files = [str(tmp_path / "a"), str(tmp_path / "b.safetensors")]
    merge_files(files, tmp_path / "merged", weights=[0.5, -2.0], formats=["diffusers", "kohya"])

    expected: dict[str, Tensor] = {}
    for weights, share in ((first, 0.5), (second, -2.0)):
        for network, updates in weights.networks.items():
            for layer, update in updates.items():
                name = f"{network}.{layer}"
                expected[name] = expected.get(name, torch.zeros(())) + share * update.product()
    merged = layers(tmp_path / "merged" / LORA_FILE)
    assert merged.keys() == expected.keys()
    for name, product in expected.items():
        torch.testing.assert_close(merged[name], product, rtol=1e-5, atol=1e-6)
    kohya = read_adapter(tmp_path / "merged/merged.safetensors")
    for network, updates in kohya.networks.items():
        for layer, update in updates.items():
            torch.testing.assert_close(update.product(), expected[f"{network}.{layer}"], rtol=1e-5, atol=1e-6)


def test_the_sum_renders_as_both_adapters_do(tiny: Path, tmp_path: Path) -> None:
    parts = [trained(tiny, LoRA(rank=rank), rank, texts=True) for rank in (2, 3)]
    for name, weights in zip("ab", parts, strict=True):
        write_diffusers(weights, tmp_path / name / LORA_FILE)
    merge_files([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "merged", weights=[0.8, 0.5])
    both, one = (StableDiffusionXLPipeline.from_pretrained(tiny) for _ in range(2))
    for name in "ab":
        both.load_lora_weights(tmp_path / name, weight_name=LORA_FILE, adapter_name=f"adapter_{name}")
    both.set_adapters(["adapter_a", "adapter_b"], [0.8, 0.5])
    one.load_lora_weights(tmp_path / "merged", weight_name=LORA_FILE)
    difference = (rendered(both, "it") - rendered(one, "it")).abs().max()
    assert difference < 1e-4
    assert (rendered(StableDiffusionXLPipeline.from_pretrained(tiny), "it") - rendered(one, "it")).abs().max() > 0.02


def test_any_adapters_and_their_tokens_are_baked_into_a_base(tiny: Path, tmp_path: Path) -> None:
    kinds = {"dora": DoRA(rank=2), "loha": LoHa(rank=2), "lokr": LoKr(rank=2, factor=2)}
    parts = {name: trained(tiny, adapter, seed, tokens=seed % 3) for seed, (name, adapter) in enumerate(kinds.items())}
    for name, weights in parts.items():
        write_kohya(weights, tmp_path / f"{name}.safetensors", with_embeddings=True)
    files, shares = [str(tmp_path / f"{name}.safetensors") for name in kinds], [0.5, 1.0, -0.3]
    merge_files(files, tmp_path / "baked", weights=shares, base=str(tiny))

    baked = StableDiffusionXLPipeline.from_pretrained(tmp_path / "baked")
    base = SDXLCheckpoint(str(tiny)).load_unet(torch.float32)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    for weights, share in zip(parts.values(), shares, strict=True):
        for layer, update in weights.networks["unet"].items():
            state[f"{layer}.weight"] += share * update.delta(base.get_parameter(f"{layer}.weight").data)
    for name, value in baked.unet.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6)

    names = ["<s0>", "<s1>", "<s2>"]
    rows = {k: torch.cat([parts[name].embeddings[k] for name in ("loha", "lokr")]) for k in ("clip_l", "clip_g")}
    apart = with_tokens(tiny, rows, names)
    apart.unet = baked.unet
    assert (rendered(apart, "<s1><s2>") - rendered(baked, "<s1><s2>")).abs().max() < 1e-5
    assert (rendered(apart, "<s0>") - rendered(baked, "<s1><s2>")).abs().max() > 1e-3


def test_other_methods_are_baked_too(tiny: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write_diffusers(trained(tiny, LoRA(rank=2), seed), tmp_path / name / LORA_FILE)
    files = [str(tmp_path / "a"), str(tmp_path / "b")]
    merge_files(files, tmp_path / "lora", Merge("ties", density=0.6))
    merge_files(files, tmp_path / "baked", Merge("ties", density=0.6), base=str(tiny))
    before, after = (StableDiffusionXLPipeline.from_pretrained(path).unet for path in (tiny, tmp_path / "baked"))
    for layer, product in layers(tmp_path / "lora" / LORA_FILE).items():
        name = f"{layer.removeprefix('unet.')}.weight"
        added = after.get_parameter(name) - before.get_parameter(name)
        torch.testing.assert_close(added.detach(), product, rtol=1e-4, atol=1e-5)


def test_tokens_are_renamed_and_the_card_says_so(tiny: Path, tmp_path: Path) -> None:
    parts = [trained(tiny, LoRA(rank=2), seed, tokens=2) for seed in (0, 1)]
    for name, weights in zip("ab", parts, strict=True):
        write_diffusers(weights, tmp_path / name / LORA_FILE)
        write_embeddings(weights, tmp_path / name / f"{name}_emb.safetensors")
    merge_files([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "both")
    again = read_adapter(tmp_path / "both")
    assert again.tokens == {"TOK": 2, "TOK2": 2}
    written = load_file(tmp_path / "both/both_emb.safetensors")
    for name, rows in written.items():
        assert torch.equal(rows, torch.cat([weights.embeddings[name] for weights in parts]))
    card = (tmp_path / "both/README.md").read_text()
    assert f"| `{tmp_path / 'a'}` | `TOK` | `<s0><s1>` | `TOK` | `<s0><s1>` |" in card
    assert f"| `{tmp_path / 'b'}` | `TOK` | `<s0><s1>` | `TOK2` | `<s2><s3>` |" in card
    assert "method='cat'" in card


def test_a_bar_in_a_name_is_no_border_of_a_cell() -> None:
    weights = AdapterWeights({}, {"clip_l": torch.ones(1, 2), "clip_g": torch.ones(1, 3)}, {"A|B": 1})
    written = card("both", {"a|b.safetensors": weights, "c": weights}, [1.0, 1.0], Merge())
    assert r"| `a\|b.safetensors` | 1 |" in written
    assert r"| `A\|B` |" in written


def test_precision(tiny: Path, tmp_path: Path) -> None:
    write_diffusers(trained(tiny, LoRA(rank=2), 0), tmp_path / "a.safetensors")
    merge_files([str(tmp_path / "a.safetensors")], tmp_path / "half", precision="bf16")
    assert {value.dtype for value in load_file(tmp_path / "half" / LORA_FILE).values()} == {torch.bfloat16}


class TestMistakes:
    @pytest.fixture
    def files(self, tiny: Path, tmp_path: Path) -> list[str]:
        """An adapter, one of another base, one cut short, one of something else, and a merge of before."""
        good = trained(tiny, LoRA(rank=2), 0)
        write_diffusers(good, tmp_path / "good.safetensors")
        unet = {
            layer: replace(update, a=torch.randn(2, 7))  # type: ignore[arg-type]
            for layer, update in good.networks["unet"].items()
        }
        write_diffusers(AdapterWeights({"unet": unet}), tmp_path / "other.safetensors")
        (tmp_path / "short.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-100])
        save_file({"model.weight": torch.zeros(1)}, tmp_path / "unknown.safetensors")
        merge_files([str(tmp_path / "good.safetensors")], tmp_path / "merged")
        return [str(tmp_path / f"{name}.safetensors") for name in ("good", "other", "short", "unknown")]

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (0, "one of them is there twice"),
            (1, r"other\.safetensors: unet\.\S+ is \d+ x 7, but \d+ x \d+ in \S+good\.safetensors"),
            (2, r"short\.safetensors: "),
            (3, r"unknown\.safetensors: model\.weight"),
        ],
    )
    def test_what_is_there_stays(self, files: list[str], tmp_path: Path, other: int, message: str) -> None:
        before = untouched(tmp_path)
        with pytest.raises(InputError, match=message) as raised:
            merge_files([files[0], files[other]], tmp_path / "merged")
        assert "\n" not in str(raised.value)
        assert untouched(tmp_path) == before

    def test_another_base_is_not_baked_into(self, files: list[str], tiny: Path, tmp_path: Path) -> None:
        before = untouched(tmp_path)
        with pytest.raises(InputError, match="another base"):
            merge_files([files[1]], tmp_path / "baked", base=str(tiny))
        with pytest.raises(InputError, match="there is something already"):
            merge_files([files[0]], tmp_path / "merged", base=str(tiny))
        assert untouched(tmp_path) == before


class TestScript:
    @pytest.fixture
    def adapters(self, tiny: Path, tmp_path: Path) -> list[str]:
        for name, seed in (("a", 0), ("b", 1)):
            write_diffusers(trained(tiny, LoRA(rank=2), seed), tmp_path / f"{name}.safetensors")
        return [str(tmp_path / f"{name}.safetensors") for name in "ab"]

    def test_settings_reach_the_merge(self, adapters: list[str], tmp_path: Path) -> None:
        main = runpy.run_path(str(SCRIPT))["main"]
        settings = ["--weights", "0.7", "-0.5", "--method=ties", "--density=0.3", "--formats", "diffusers", "kohya"]
        main(["--adapters", *adapters, "--output", str(tmp_path / "by_script"), *settings])
        formats: Any = ["diffusers", "kohya"]
        merge_files(adapters, tmp_path / "by_hand", Merge("ties", density=0.3), weights=[0.7, -0.5], formats=formats)
        ours, theirs = (layers(tmp_path / name / LORA_FILE) for name in ("by_script", "by_hand"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert (tmp_path / "by_script/by_script.safetensors").exists()

    def test_reads_a_config(self, adapters: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        settings = {"adapters": adapters, "output": str(tmp_path / "merged"), "weights": [1, 2], "method": "svd"}
        (tmp_path / "merge.yaml").write_text(yaml.safe_dump(settings))
        runpy.run_path(str(SCRIPT))["main"](["--config", str(tmp_path / "merge.yaml"), "--rank=3"])
        assert capsys.readouterr().out == f"Merged into {tmp_path / 'merged'}\n"
        updates = read_adapter(tmp_path / "merged").networks["unet"].values()
        assert {update.rank for update in updates} == {3}

    def test_mistakes_are_one_line(
        self, adapters: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(SCRIPT))["main"](
                ["--adapters", *adapters, "--weights", "1", "--output", str(tmp_path / "merged")]
            )
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("merge.py: error: there are 2 adapters, but 1 weights")
