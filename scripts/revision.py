"""Which code measured something."""

import subprocess
from pathlib import Path


def commit() -> str:
    """Returns the commit that the code is at, marked if there are changes to it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
