import subprocess
import sys
from pathlib import Path

from PIL import Image

EPOCHS = """
import resource, sys
from itertools import islice
from lit_edm.data import CaptionedImagesDataModule

for repeats, batches in ((1, 22), (100, 66)):
    data = CaptionedImagesDataModule(sys.argv[1], resolution=1024, repeats=repeats, random_flip=True)
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(loader) == 22 * repeats
    for _ in islice(loader, batches):
        pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def test_a_hundred_repeats_cost_no_memory(icons: Path, tmp_path: Path) -> None:
    """Pitfall 18. A copy of each decoded image would be 12 MB; three rounds of the 22 icons would show them."""
    for path in icons.glob("*.webp"):
        Image.open(path).convert("RGB").resize((1024, 1024)).save(tmp_path / f"{path.stem}.jpg")
        (tmp_path / f"{path.stem}.txt").write_text("an icon")
    assert len(list(tmp_path.glob("*.jpg"))) == 22
    said = subprocess.run([sys.executable, "-c", EPOCHS, tmp_path], capture_output=True, text=True, check=True).stdout
    once, hundred = map(int, said.split())
    assert hundred - once < 50e6
