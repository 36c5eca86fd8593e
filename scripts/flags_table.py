"""Writes docs/diffusers_flags.md, diffusers' flags and our settings side by side: `python scripts/flags_table.py`.

The facts are in docs/diffusers_flags.yaml.
"""

from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parents[1] / "docs"
SCRIPTS = {
    "advanced": "examples/advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced.py",
    "dreambooth": "examples/dreambooth/train_dreambooth_lora_sdxl.py",
}
ABOUT = """\
# From diffusers' flags to settings

What does the same as each flag of diffusers' two LoRA scripts for SDXL, with what the scripts take if it is not given:

- advanced, {advanced} flags: `{advanced_path}`
- dreambooth, {dreambooth} flags: `{dreambooth_path}`

Settings leave out `init_args`, as the command line may: `model.adapter.rank: 4` is `--model.adapter.rank 4` there, and
in YAML

```yaml
model:
  init_args:
    adapter:
      init_args:
        rank: 4
```

What starts with a capital is a callback: `FreezeEmbeddings.ti_frac: 0.5` is an item of `trainer.callbacks` with that
`class_path` and `init_args: {{ti_frac: 0.5}}`. Values are the scripts' own, or examples where these are none or off.
"""


def read_facts() -> dict[str, list[dict[str, Any]]]:
    """Returns, for each topic, what is known of each flag."""
    return yaml.safe_load((DOCS / "diffusers_flags.yaml").read_text(encoding="utf-8"))


def page(facts: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the whole page as Markdown, a table for each topic."""
    flags = [flag for rows in facts.values() for flag in rows]
    counts = {script: sum(script in flag["default"] for flag in flags) for script in SCRIPTS}
    parts = [ABOUT.format(**counts, **{f"{script}_path": path for script, path in SCRIPTS.items()})]
    head = ["flag", "what it does", *SCRIPTS, "in lit_edm"]
    for topic, rows in facts.items():
        lines = [head, ["---"] * len(head), *map(cells, rows)]
        parts.append(f"## {topic}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def cells(flag: dict[str, Any]) -> list[str]:
    """Returns a flag's line of a table."""
    defaults = [default(flag["default"][script]) if script in flag["default"] else "" for script in SCRIPTS]
    ours = [f"`{key}: {as_yaml(value)}`" for key, value in flag.get("ours", {}).items()]
    ours += [flag["note"]] if "note" in flag else []
    return [f"`--{flag['flag']}`", flag["does"], *defaults, "<br>".join(ours)]


def default(value: Any) -> str:
    """Returns a default as people say it."""
    return {"None": "none", "False": "off", "True": "on"}.get(str(value), str(value))


def as_yaml(value: Any) -> str:
    """Returns a value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()


if __name__ == "__main__":
    (DOCS / "diffusers_flags.md").write_text(page(read_facts()), encoding="utf-8")
