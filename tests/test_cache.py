import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_edm.cache import DiskCache, MemoryCache, TensorCache, fingerprint
from lit_edm.errors import InputError

Tensors = dict[str, Tensor]


@pytest.fixture(params=["memory", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> TensorCache:
    return MemoryCache() if request.param == "memory" else DiskCache(str(tmp_path / "new" / "cache"))


def tensors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "plain": torch.randn(3, 4, generator=generator),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "turned": torch.randn(3, 4, generator=generator).T,
        "levels": torch.arange(6, dtype=torch.uint8),
    }


def same(one: Tensors | None, other: Tensors) -> bool:
    return (
        one is not None
        and one.keys() == other.keys()
        and all(one[k].equal(other[k]) and one[k].dtype == other[k].dtype for k in one)
    )


class TestContract:
    def test_gives_back_what_was_put(self, cache: TensorCache) -> None:
        assert cache.get("a") is None
        assert "a" not in cache
        cache.put("a", tensors())
        cache.put("b", tensors(1))
        assert "a" in cache
        assert same(cache.get("a"), tensors())
        assert same(cache.get("b"), tensors(1))

    def test_the_later_of_two_stays(self, cache: TensorCache) -> None:
        cache.put("a", tensors())
        cache.put("a", tensors(1))
        assert same(cache.get("a"), tensors(1))

    def test_keys_may_be_anything(self, cache: TensorCache) -> None:
        keys = ["", "../outside", "ä/ö\n", "x" * 5000, "x" * 5001]
        for number, key in enumerate(keys):
            cache.put(key, tensors(number))
        assert all(same(cache.get(key), tensors(number)) for number, key in enumerate(keys))

    def test_later_changes_do_not_reach_what_is_kept(self, cache: TensorCache) -> None:
        given = tensors()
        cache.put("a", given)
        given["plain"].zero_()
        assert same(cache.get("a"), tensors())

    def test_autograd_takes_what_was_born_in_inference_mode(self, cache: TensorCache) -> None:
        with torch.inference_mode():
            cache.put("a", {"x": torch.ones(2) * 3})
        kept = cache.get("a")
        assert kept is not None
        weight = torch.ones(2, requires_grad=True)
        (weight * kept["x"]).sum().backward()
        assert weight.grad is not None
        assert weight.grad.tolist() == [3, 3]

    def test_nothing_kept_requires_a_gradient(self, cache: TensorCache) -> None:
        cache.put("a", {"x": torch.ones(2, requires_grad=True) * 2})
        kept = cache.get("a")
        assert kept is not None
        assert not kept["x"].requires_grad

    @pytest.mark.parametrize("carry", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
    def test_survives_the_way_to_another_process(
        self, cache: TensorCache, carry: Callable[[TensorCache], TensorCache]
    ) -> None:
        cache.put("a", tensors())
        assert same(carry(cache).get("a"), tensors())

    @pytest.mark.parametrize("context", ["fork", "spawn"])
    def test_workers_read_it(self, cache: TensorCache, context: str) -> None:
        for number in range(4):
            cache.put(str(number), tensors(number))
        loader = DataLoader(Reading(cache), batch_size=None, num_workers=2, multiprocessing_context=context)
        assert all(same(read, tensors(number)) for number, read in enumerate(loader))


class Reading(Dataset[Tensors]):
    """Reads four entries."""

    def __init__(self, cache: TensorCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensors:
        return self.cache.get(str(index)) or {}


class TestMemory:
    def test_two_share_nothing_but_are_equal_settings(self) -> None:
        first, second = MemoryCache(), MemoryCache()
        first.put("a", tensors())
        assert "a" not in second
        assert first == second
        assert not first.is_shared


class TestDisk:
    def test_another_run_finds_what_is_kept(self, tmp_path: Path) -> None:
        DiskCache(str(tmp_path)).put("a", tensors())
        assert same(DiskCache(str(tmp_path)).get("a"), tensors())
        assert DiskCache(str(tmp_path)).is_shared

    @pytest.mark.parametrize("left", [0, 5, 60, -1])
    def test_damaged_file_counts_as_not_there(self, tmp_path: Path, left: int) -> None:
        cache = DiskCache(str(tmp_path))
        cache.put("a", tensors())
        path = cache.path("a")
        path.write_bytes(path.read_bytes()[:left])
        assert cache.get("a") is None
        assert "a" not in cache
        cache.put("a", tensors())
        assert same(cache.get("a"), tensors())

    def test_no_half_file_is_ever_seen(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As if the process were killed when all but the last step of writing is done."""
        cache = DiskCache(str(tmp_path))
        cache.put("a", tensors())
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        for key in ("a", "b"):
            with pytest.raises(KeyboardInterrupt):
                cache.put(key, tensors(1))
        assert same(cache.get("a"), tensors())
        assert "b" not in cache
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [cache.path("a")], "nothing is left behind"

    def test_tells_before_anything_is_made_that_nothing_can_be_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "kept").mkdir()
        for folder in ("file", "file/below"):
            with pytest.raises(InputError, match=r"^data\.key\.init_args\.folder: .*file is a file: name a folder"):
                DiskCache(str(tmp_path / folder)).check("data.key")
        DiskCache(str(tmp_path / "new/below")).check("data.key")
        monkeypatch.setattr("os.access", lambda *_: False)
        DiskCache(str(tmp_path / "kept")).check("data.key")  # it may hold all that a run asks for
        with pytest.raises(InputError, match=r"cannot be written to, to make .*new: name another"):
            DiskCache(str(tmp_path / "new")).check("data.key")
        MemoryCache().check("data.key")

    @pytest.mark.parametrize("error", [NotADirectoryError, PermissionError])
    def test_a_folder_that_cannot_be_written_to(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
    ) -> None:
        def refuse(*_: object) -> None:
            raise error("no")

        monkeypatch.setattr("lit_edm.cache.write_tensors", refuse)
        with pytest.raises(InputError, match=r"^DiskCache\.folder: .* cannot be written to: name another folder"):
            DiskCache(str(tmp_path)).put("a", tensors())

    def test_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        DiskCache("~/kept").put("a", tensors())
        assert (tmp_path / "kept").is_dir()


class TestFingerprint:
    def test_is_a_function_of_names_values_and_settings(self) -> None:
        assert fingerprint(tensors(), "x") == fingerprint(dict(reversed(tensors().items())), "x")
        others = [
            (tensors(), "y"),
            (tensors(1), "x"),
            ({**tensors(), "more": torch.ones(1)}, "x"),
            ({**tensors(), "levels": torch.arange(6, dtype=torch.int8)}, "x"),
            ({**tensors(), "levels": torch.arange(6, dtype=torch.uint8).view(2, 3)}, "x"),
            ({{"plain": "flat"}.get(name, name): value for name, value in tensors().items()}, "x"),
        ]
        assert len({fingerprint(*other) for other in others} | {fingerprint(tensors(), "x")}) == len(others) + 1

    def test_one_changed_weight_is_another_network(self) -> None:
        changed = tensors()
        changed["half"][3] += 0.5
        assert fingerprint(changed) != fingerprint(tensors())
