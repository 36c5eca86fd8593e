import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HELD = """
import os, sys
from pathlib import Path
from torch.utils.data import Dataset
from lit_edm.data.draws import EpochBatches, Pool
from lit_edm.data.loading import ResumableLoader

class Numbers(Dataset):
    def __getitem__(self, draws):
        return os.getpid()

loader = ResumableLoader(Numbers(), EpochBatches([Pool(range(8), (1, 1), 8)], 2), lambda: 0, num_workers=2)
iterator = iter(loader)
print(next(iterator), next(iterator), flush=True)
sys.stdin.readline()
if sys.argv[1] == "raises":
    raise RuntimeError("whose traceback holds the iterator")
"""


@pytest.mark.parametrize("end", ["returns", "raises"])
def test_workers_outlive_signals_of_others_and_not_the_process_that_trains(tmp_path: Path, end: str) -> None:
    (tmp_path / "held.py").write_text(HELD)
    command = [sys.executable, "held.py", end]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:  # type: ignore[call-overload]
        workers = [int(number) for number in process.stdout.readline().split()]
        assert len(set(workers)) == 2
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
        time.sleep(0.5)
        assert all(Path(f"/proc/{worker}").exists() for worker in workers)
        try:
            process.communicate("\n", timeout=30)
        finally:
            process.kill()  # else a test that fails would wait for it
    assert process.returncode == (end == "raises")
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
