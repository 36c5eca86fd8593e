import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import lit_edm

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "lit_edm").glob("**/__init__.py")}
    assert set(listed) == found | {"lit_edm.callbacks"}


def test_only_lit_edm_is_installed_at_the_top() -> None:
    assert [name for name, dists in packages_distributions().items() if "lit-edm" in dists] == ["lit_edm"]
    assert version("lit-edm") == lit_edm.__version__
