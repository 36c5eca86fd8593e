"""The quickstart teaches: on things that nothing has seen in 3d, and with a margin that ten of ten seeds keep.

A loss that falls would be no evidence, for that of a constant picture falls too. What is compared is in
scripts/tiny_base_tuning.py, and what other ways of training reach in benchmarks/tiny_base.md.
"""

import pytest
import tiny_base_tuning as tuning


def missed(way: str) -> set[str]:
    """Fine-tunes; returns the comparisons that do not hold."""
    held_out = tuning.HeldOut(tuning.BASE / "held_out")
    before, after = tuning.fine_tune(tuning.BASE, 0, tuning.WAYS[way])
    drawn = tuning.drawings(before, after, held_out)
    return set(tuning.missed(tuning.figures(before, after, held_out, drawn)))


def test_the_quickstart_teaches_a_style() -> None:
    assert missed(tuning.QUICKSTART) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("no gradient", {"TOK / under flat", "taught / untaught tokens", "with / without the adapter"}),
        ("tokens alone", {"with / without the adapter"}),
        ("LoRA alone, tokens as they start", {"taught / untaught tokens"}),
    ],
)
def test_without_a_part_it_does_not(way: str, expected: set[str]) -> None:
    assert missed(way) >= expected
