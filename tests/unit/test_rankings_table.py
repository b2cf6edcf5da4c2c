"""The published tables of rankings are those of the rows that were measured."""

from __future__ import annotations

import pandas as pd

from benchmarks import pages, rankings_table


def test_tables_in_the_documentation_are_those_of_the_rows() -> None:
    page = rankings_table.PAGE.read_text(encoding="utf-8")
    for name, table in rankings_table.tables().items():
        assert pages.shown(page, name) == table, "python -m benchmarks.rankings_table --write"
        assert table.count("\n") > 4


def test_every_row_that_was_measured_is_in_a_table() -> None:
    rows = pd.read_csv(rankings_table.RESULTS / "rankings.csv")
    tables = rankings_table.tables()
    assert len(rows) == sum(table.count("\n") - 1 for name, table in tables.items() if name.startswith("all rows"))
    key = ["model", "corpus", "ranking_tokens", "n_tokens", "ranking", "scope", "replacement", "p_percent"]
    assert not rows.duplicated(key).any()
    assert set(rows["model"]) == {"smollm2-135m"}


def test_writing_a_table_changes_nothing_else() -> None:
    page = "six <!-- counts: begin -->x<!-- counts: end --> six"
    wanted = "six <!-- counts: begin -->\n\n| 1 |\n\n<!-- counts: end --> six"
    assert pages.renewed(page, "counts", "| 1 |") == pages.renewed(wanted, "counts", "| 1 |") == wanted
