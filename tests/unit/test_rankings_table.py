"""The published tables of rankings are those of the rows that were measured."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks import pages, rankings_table
from neuron_sparsity.replacement import REPLACEMENTS
from neuron_sparsity.scores import RANKINGS, best_ranking


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


@pytest.mark.parametrize("replacement", REPLACEMENTS)
@pytest.mark.parametrize("gradients", [True, False])
def test_the_default_is_the_ranking_that_lets_most_go_or_nearly(replacement: str, gradients: bool) -> None:
    rows = pd.read_csv(rankings_table.RESULTS / "rankings.csv")
    rows = rows[(rows["replacement"] == replacement) & (rows["p_percent"] == 5) & rows["ranking"].isin(list(RANKINGS))]
    usable = rows[[gradients or RANKINGS[by].needs != "saliency" for by in rows["ranking"]]]
    counts = usable.set_index("ranking")["n_removable"]
    assert len(counts) >= 5
    assert counts[best_ranking(replacement, gradients=gradients)] > 0.95 * counts.max()


def test_writing_a_table_changes_nothing_else() -> None:
    page = "six <!-- counts: begin -->x<!-- counts: end --> six"
    wanted = "six <!-- counts: begin -->\n\n| 1 |\n\n<!-- counts: end --> six"
    assert pages.renewed(page, "counts", "| 1 |") == pages.renewed(wanted, "counts", "| 1 |") == wanted
