import re
import runpy
from pathlib import Path

import pytest


def test_speeds_of_pixels_and_latents(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts/benchmark_loading.py"))
    script["main"](images=2, resolution=64, num_workers=0, batch_size=2)
    speeds = re.findall(r"(\w+): +([\d.]+) images/s", capsys.readouterr().out)
    assert [name for name, _ in speeds] == ["pixels", "latents"]
    assert all(float(speed) > 0 for _, speed in speeds)
