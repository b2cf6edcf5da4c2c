"""The published table of rankings is that of the rows that were measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks import rankings_table


def test_table_in_the_documentation_is_that_of_the_rows(repository: Path) -> None:
    page = (repository / "docs" / "results" / "ablation.md").read_text(encoding="utf-8")
    shown = rankings_table.in_page(page)
    assert shown == rankings_table.table(), "python -m benchmarks.rankings_table --write"
    assert shown.count("\n") > 8
