import pytest

from lit_edm.data.team import Team


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_all_work_is_done_once_and_waited_for(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    waited, done = [], []
    for rank in range(size):
        for number in Team(rank, size, lambda: waited.append(len(done))).share(range(7), "Working"):
            done.append(number)
            assert len(waited) == rank, "none waits before it is done"
    assert sorted(done) == list(range(7))
    assert len(waited) == size
    assert capsys.readouterr().out.count("Working") == 1, "the first alone shows its progress"


def test_each_may_do_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert [list(Team(rank, 2).all([1, 2], "Working")) for rank in range(2)] == [[1, 2]] * 2
    assert list(Team().all([], "Idling")) == []
    assert "Idling" not in capsys.readouterr().out
