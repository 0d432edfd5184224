"""README's tables come from the results, and are up to date."""

from dataclasses import replace

import pytest
from test_bench_cli import _comparison

from benchmarks import readme_tables


def test_readme_shows_the_results_that_are_there() -> None:
    text = readme_tables.README.read_text(encoding="utf-8")
    assert readme_tables.render(text) == text, "run: make readme-tables"


def test_rivals_are_shown_with_their_ratio_and_the_faster_ones_bold() -> None:
    head, _, row = readme_tables.networks_table(_comparison(), 1)
    assert head == "| network | zeros | **tvm_pivot** | A | B | C |"
    assert row == "| net | 90 % 8x1 blocks | 2.00 | 5.00 (2.50x) | **1.00 (0.50x)** | failed |"


def test_models_that_were_not_run_by_ours_or_are_not_shown_have_no_row() -> None:
    found = _comparison()
    other = replace(found, models=tuple(replace(m, variant="4x1@0.2") for m in found.models))
    assert len(readme_tables.networks_table(other, 1)) == 2
    assert len(readme_tables.networks_table(found, 2)) == 2


def test_replacing_needs_exactly_one_place() -> None:
    text = "a\n<!-- t -->\nold\n<!-- end of t -->\nb"
    assert readme_tables.replace_table(text, "t", ["| new |"]) == (
        "a\n<!-- t -->\n\n| new |\n\n<!-- end of t -->\nb"
    )
    for wrong in ("nothing", text + text):
        with pytest.raises(ValueError, match="t"):
            readme_tables.replace_table(wrong, "t", [])
