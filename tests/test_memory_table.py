"""The account of memory that needs no GPU, in small."""

import memory_table
import pytest
import torch
from torch import nn

from lit_edm.sdxl.memory import nothing


def test_the_peak_is_that_of_what_is_alive_at_once() -> None:
    """Of a chain of layers without a gradient two activations are, with one all that they keep and two gradients."""
    layers = nn.Sequential(*(nn.Linear(100, 100, bias=False, device="meta") for _ in range(5))).requires_grad_(False)
    x, row = nothing(1000, 100), 4 * 1000 * 100
    with memory_table.Alive(iter((x, *layers.parameters()))) as alive, torch.no_grad():
        layers(x)
    assert (alive.peak, alive.now) == (2 * row, 0)
    with memory_table.Alive(iter((x, *layers.parameters()))) as alive:
        output = layers(x.requires_grad_())
        assert alive.now == row, "frozen layers keep no inputs"
        output.backward(output)
        del output
    assert alive.peak == 3 * row, "the output, a gradient and the one before it"


def test_rows_fit_together() -> None:
    module = memory_table.module_of("LoRA", "tiny")
    assert all(parameter.is_meta for parameter in module.parameters())
    before, after = (memory_table.run(module, "LoRA", 1, learns) for learns in (True, False))
    assert (before[2], after[2], after[4]) == ("before", "after", "0.00")
    shape = module.latents.shape(1024, 1024)
    one, two = (memory_table.peak_of_step(memory_table.BareNetworks(module, False), count, shape) for count in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.02)
    first, *_, last = memory_table.budgets(module, "LoRA", 1)
    assert first[3].split(" of ")[0] == first[3].split(" of ")[1]
    assert (last[3].split(" of ")[0], last[5]) == ("0", "0.00")
