"""Writes an SDXL-shaped checkpoint with random weights: `python scripts/make_tiny_sdxl.py build/tiny-sdxl`.

With `--size small` or `--size full` it is one to measure with.
"""

from jsonargparse import auto_cli

from lit_edm.sdxl.tiny import make_tiny_sdxl

if __name__ == "__main__":
    auto_cli(make_tiny_sdxl)
