"""The published table of rankings is that of the rows that were measured."""

from __future__ import annotations

from benchmarks import pages, rankings_table


def test_table_in_the_documentation_is_that_of_the_rows() -> None:
    shown = pages.shown(rankings_table.PAGE.read_text(encoding="utf-8"), rankings_table.NAME)
    assert shown == rankings_table.table(), "python -m benchmarks.rankings_table --write"
    assert shown.count("\n") > 8


def test_writing_a_table_changes_nothing_else() -> None:
    page = "six <!-- counts: begin -->x<!-- counts: end --> six"
    wanted = "six <!-- counts: begin -->\n\n| 1 |\n\n<!-- counts: end --> six"
    assert pages.renewed(page, "counts", "| 1 |") == pages.renewed(wanted, "counts", "| 1 |") == wanted
