"""Lower layers never import higher ones, and the paper's room imports torch alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOW = {"errors", "files", "seeds"}
ALLOWED = {
    "lit_edm/errors.py": set(),
    "lit_edm/files.py": {"errors"},
    "lit_edm/seeds.py": set(),
    "lit_edm/batch.py": set(),
    "lit_edm/metrics.py": set(),
    "lit_edm/cache.py": {"errors", "files"},
    "lit_edm/config_text.py": {"errors"},
    "lit_edm/wording.py": set(),
    "lit_edm/usage.py": set(),
    "lit_edm/checkpoints.py": {"errors", "files"},
    "lit_edm/loggers.py": {"errors", "files"},
    "lit_edm/optim": {"errors", "optim"},
    "lit_edm/edm": {"edm", "errors"},
    "lit_edm/sdxl": {"cache", "edm", "sdxl"} | LOW,
    "lit_edm/data": {"batch", "cache", "data"} | LOW,
    "lit_edm/modules": {"batch", "cache", "edm", "sdxl", "optim", "modules"} | LOW,
    "callbacks": {"batch", "cache", "checkpoints", "loggers", "metrics", "optim", "edm", "sdxl", "modules", "callbacks"}
    | LOW,
}
OUTSIDE = {
    "lit_edm/files.py": {"torch", "safetensors"},
    "lit_edm/cache.py": {"torch"},
    "lit_edm/config_text.py": {"yaml"},
    "lit_edm/wording.py": {"lightning"},
    "lit_edm/usage.py": set(),
    "lit_edm/__main__.py": set(),
    "lit_edm/checkpoints.py": {"torch", "lightning"},
    "lit_edm/loggers.py": {"lightning"},
    "lit_edm/optim": {"torch"},
    "lit_edm/edm": {"torch"},
    "lit_edm/metrics.py": {"torch", "torchmetrics"},
    # datasets and pyarrow where such data are asked for, sklearn where the digits are
    "lit_edm/data": {"torch", "PIL", "numpy", "lightning", "rich", "sklearn", "datasets", "pyarrow"},
}


def imports(place: str) -> set[tuple[Path, str]]:
    """All modules imported by a file or by the files of a folder, anywhere in them."""
    files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
    assert files, place
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {(file, alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: imports are absolute"
                found.add((file, node.module or ""))
    return found


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_point_down(place: str) -> None:
    for file, name in imports(place):
        top, _, rest = name.partition(".")
        if top == "lit_edm" and rest:
            assert rest.split(".")[0] in ALLOWED[place], f"{file} imports {name}"


@pytest.mark.parametrize("place", OUTSIDE)
def test_rooms_need_no_other_library(place: str) -> None:
    for file, name in imports(place):
        top = name.partition(".")[0]
        assert top in OUTSIDE[place] | {"lit_edm"} | sys.stdlib_module_names, f"{file} imports {name}"


def test_only_data_modules_know_lightning() -> None:
    users = {file.name for file, name in imports("lit_edm/data") if name.startswith("lightning")}
    assert users == {"datamodule.py", "labelled.py", "prompts.py"}


def test_no_circles() -> None:
    """Within a layer, too: a depth-first walk over the package's files never comes back."""
    names = {f: ".".join(f.relative_to(ROOT).with_suffix("").parts) for f in (ROOT / "lit_edm").rglob("*.py")}
    names |= {f: f"lit_edm.{n}" for f in (ROOT / "callbacks").rglob("*.py") for n in [f"callbacks.{f.stem}"]}
    edges: dict[str, set[str]] = {name.removesuffix(".__init__"): set() for name in names.values()}
    for file, name in names.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and file.name != "__init__.py":
                edges[name] |= {node.module} & edges.keys()
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in edges[name]:
                walk(other, (*path, name))
            done.add(name)

    for name in edges:
        walk(name, ())
