from pathlib import Path
from typing import Any

import pytest

from lit_edm.batch import PictureRequest, RequestsPictures
from lit_edm.data import PromptsDataModule
from lit_edm.errors import InputError


def set_up(**settings: Any) -> PromptsDataModule:
    data = PromptsDataModule(**settings)
    data.setup("predict")
    return data


def test_a_grid_has_every_combination_once() -> None:
    data = set_up(prompts=["a", "b"], seeds=(3, 4, 3), adapter_scales=(0.5, 1.0), height=32, width=48)
    requests = data.requests()
    assert [request["index"] for request in requests] == list(range(8))
    found = [(request["scale"], request["seed"], request["prompt"]) for request in requests]
    assert found == [(scale, seed, prompt) for scale in (0.5, 1.0) for seed in (3, 4) for prompt in "ab"]
    assert {request["size"] for request in requests} == {(32, 48)}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 99])
def test_batches_hold_all_requests_in_order_and_one_scale_each(batch_size: int) -> None:
    data = set_up(prompts=["a", "b", "c"], seeds=(0, 1), adapter_scales=(0.0, 1.0), batch_size=batch_size)
    batches: list[list[PictureRequest]] = list(data.predict_dataloader())
    assert [request for batch in batches for request in batch] == data.requests()
    assert all(len({request["scale"] for request in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) == min(batch_size, 6)


def test_prompts_of_a_file_follow_those_of_the_list(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red apple  \n\n  Äpfel, № 2\n", encoding="utf-8")
    data = set_up(prompts=["first"], prompts_file=path)
    assert [request["prompt"] for request in data.requests()] == ["first", "a red apple", "Äpfel, № 2"]
    assert isinstance(data, RequestsPictures)


class TestMistakes:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({}, "there is no prompt: write some in data.init_args.prompts, or name a prompts_file"),
            ({"prompts": ["a"], "seeds": ()}, "data.init_args.seeds is empty"),
            ({"prompts": ["a"], "adapter_scales": ()}, "data.init_args.adapter_scales is empty"),
            ({"prompts": ["a"], "seeds": (1, -2)}, "data.init_args.seeds: -2 is negative"),
            ({"prompts": ["a"], "batch_size": 0}, "data.init_args.batch_size is 0: give at least 1"),
            ({"prompts": ["a"], "height": 0}, "data.init_args.height is 0: give at least 1"),
            ({"prompts_file": "nowhere.txt"}, "nowhere.txt is no file: correct data.init_args.prompts_file"),
        ],
    )
    def test_one_line(self, settings: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError) as error:
            set_up(**settings)
        assert said in str(error.value)

    def test_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_text("\n \n")
        with pytest.raises(InputError, match="there is no prompt"):
            set_up(prompts_file=str(tmp_path / "empty.txt"))

    def test_more_processes_than_batches(self) -> None:
        class TwoProcesses:
            world_size = 2

        data = set_up(prompts=["a", "b"], batch_size=2)
        data.trainer = TwoProcesses()  # type: ignore[assignment]
        with pytest.raises(InputError, match=r"there are 1 batches of pictures for 2 processes: lower data\.init_args"):
            data.predict_dataloader()
