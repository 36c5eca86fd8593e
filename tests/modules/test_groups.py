import torch
from torch import nn

from lit_edm.modules.groups import ParameterGroups


def make() -> ParameterGroups:
    return ParameterGroups(
        {"unet": [nn.Parameter(torch.ones(2))], "embeddings": [nn.Parameter(torch.zeros(3))], "x": []}
    )


def test_empty_groups_are_left_out() -> None:
    assert list(make().parameters) == ["unet", "embeddings"]


def test_groups_rest_and_learn_again() -> None:
    groups = make()
    assert groups.learn("embeddings", "x")
    assert not groups.learn("x")
    groups.set_trained("embeddings", False)
    groups.set_trained("embeddings", False)
    assert not groups.learn("embeddings")
    assert groups.learn("embeddings", "unet")
    groups.set_trained("embeddings", True)
    assert groups.learn("embeddings")


def test_settings_that_are_given_reach_the_optimizer_zero_included() -> None:
    settings = {"unet": {}, "embeddings": {"lr": None, "weight_decay": 0.0}}
    optimizer = torch.optim.AdamW(make().for_optimizer(settings), lr=0.5, weight_decay=0.1)
    decays = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert decays == {"unet": (0.5, 0.1), "embeddings": (0.5, 0.0)}


def test_resting_parameters_stay_in_the_graph_of_several_processes(monkeypatch: object) -> None:
    groups = make()
    groups.set_trained("embeddings", False)
    assert groups.nothing_of_resting() == 0.0
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # type: ignore[attr-defined]
    nothing = groups.nothing_of_resting()
    nothing.backward()  # type: ignore[union-attr]
    assert nothing == 0
    assert [p.grad is not None for name in ("unet", "embeddings") for p in groups.parameters[name]] == [False, True]
