"""Merges files of adapters: what scripts/merge.py does."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_edm.errors import InputError
from lit_edm.files import write_whole
from lit_edm.sdxl.checkpoint import SDXLCheckpoint
from lit_edm.sdxl.export import Format, write_adapter
from lit_edm.sdxl.formats import Precision, read_adapter, write_merged
from lit_edm.sdxl.markdown import as_cell, as_code, table
from lit_edm.sdxl.merge import Merge, summed
from lit_edm.sdxl.merge_tokens import renamed_tokens
from lit_edm.sdxl.updates import AdapterWeights


def merge_files(
    adapters: Sequence[str],
    output: Path,
    merge: Merge = Merge(),
    weights: Sequence[float] | None = None,
    formats: Sequence[Format] = ("diffusers",),
    precision: Precision = "float32",
    base: str | None = None,
) -> Path:
    """Merges adapters into one, or into a base; everything is read and merged before the first file is written.

    Args:
        adapters: Files, or folders as SaveAdapter writes them, in any format.
        output: Folder to write: the adapter, the new tokens' embeddings and README.md; with a base, a whole checkpoint
            that StableDiffusionXLPipeline.from_pretrained reads.
        merge: How the updates are merged.
        weights: One for each adapter, negative to subtract it; 1 for all if not given. Tokens are not weighted.
        formats: Layouts of the adapter.
        precision: Precision of what is written.
        base: Folder or Hub name of what the adapters are merged into. The method cat then adds updates of any kind.

    Returns:
        The folder.

    Raises:
        InputError: A file cannot be read, adapters cannot be merged so, or are of another base.
    """
    if len({*adapters}) < len(adapters):
        raise InputError(f"adapters: {', '.join(adapters)}: one of them is there twice; give it the sum of its weights")
    read = {path: read_adapter(path) for path in adapters}
    shares = [1.0] * len(adapters) if weights is None else weights
    method = summed if base and merge.method == "cat" else merge
    result, name = method(read, shares), output.resolve().name
    if base:
        write_merged(SDXLCheckpoint(base), result, output, precision)
    else:
        write_adapter(result, output, name, formats, precision)
    words = card(name, read, shares, merge)
    return write_whole(output / "README.md", lambda part: part.write_text(words, encoding="utf-8")).parent


def card(title: str, adapters: Mapping[str, AdapterWeights], weights: Sequence[float], merge: Merge) -> str:
    """Returns what was merged and how, and what the tokens are called now, Markdown."""
    rows = [[code_cell(path), f"{weight:g}"] for path, weight in zip(adapters, weights, strict=True)]
    parts = [f"# {as_cell(title)}", f"Merged with lit_edm: {as_code(str(merge))}.", table(["adapter", "weight"], rows)]
    if renamed := renamed_tokens(adapters):
        names = [
            [code_cell(text) for text in (tokens.path, tokens.old_word, tokens.old_tokens, tokens.word, tokens.tokens)]
            for tokens in renamed
        ]
        titles = ["adapter", "placeholder there", "tokens there", "placeholder", "tokens"]
        how = "Prompts for diffusers name the tokens of the last column; for Forge and AUTOMATIC1111, the placeholder."
        parts += ["## Trigger words", how, table(titles, names)]
    return "\n\n".join(parts) + "\n"


def code_cell(text: str) -> str:
    """Marks words as code for a cell of a table, which a bar would end even there."""
    return as_code(text).replace("|", r"\|")
