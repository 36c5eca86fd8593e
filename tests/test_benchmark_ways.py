from collections.abc import Callable
from typing import Any

import benchmark_ways
import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor

from lit_edm.sdxl.lora_layers import LoRALinear
from lit_edm.sdxl.memory import unet_inputs


def test_a_row_for_each_way_adapter_and_precision(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark_ways.main("tiny", side=32, batch_size=1, rounds=1, compiled=False)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    expected = ["peft's layers", "channels_last", "AttnProcessor", "SDPA's MATH"]
    for adapter in ("LoRA", "DoRA"):
        for precision, more in (("float32", []), ("bf16", ["autocast"])):
            assert [row[0] for row in rows if row[1:3] == [adapter, precision]] == expected + more
    assert all(float(row[3]) > 0 for row in rows)


@pytest.mark.parametrize("way", ["peft's layers", "channels_last", "AttnProcessor", "SDPA's MATH"])
def test_all_ways_compute_the_same(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    calls: list[object] = []
    monkeypatch.setattr(Linear, "forward", counted(Linear.forward, calls))
    change, context = benchmark_ways.ways(torch.float32, "cpu", compiled=False)[way]
    for changed in (False, True):
        torch.manual_seed(0)
        unet = benchmark_ways.unet_of("LoRA", "tiny", torch.float32, "cpu")
        args, kwargs = unet_inputs(unet.config, torch.float32, (2, 4, 8, 8), learns_text=False)
        args = [torch.linspace(-1, 1, value.numel()).view(value.shape) for value in args]
        added = {key: torch.ones(value.shape) for key, value in kwargs["added_cond_kwargs"].items()}
        if changed:
            change(unet)
            with context():
                outputs.append(unet(*args, added_cond_kwargs=added).sample)
        else:
            outputs.append(unet(*args, added_cond_kwargs=added).sample)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert bool(calls) == (way == "peft's layers")
    assert LoRALinear.forward is benchmark_ways.OURS


def counted(forward: Callable[..., Tensor], calls: list[object]) -> Callable[..., Tensor]:
    def call(layer: Linear, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(layer)
        return forward(layer, *args, **kwargs)

    return call
