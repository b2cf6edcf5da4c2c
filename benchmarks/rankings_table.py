"""The table of docs/results/ablation.md, from the rows that `benchmarks.rankings --save` has left.

python -m benchmarks.rankings_table            prints the table
python -m benchmarks.rankings_table --write    puts it into docs/results/ablation.md
"""

from __future__ import annotations

import pandas as pd

from benchmarks.harness import RESULTS
from benchmarks.pages import DOCS, command

PAGE, NAME = DOCS / "results" / "ablation.md", "rankings table"


def table() -> str:
    """Return the table in Markdown: a row for each ranking, replacement and p, those that remove most first."""
    rows = pd.read_csv(RESULTS / "rankings.csv")
    most = rows.groupby(["replacement", "ranking"])["n_removable"].transform("max")
    rows = rows.assign(most=most).sort_values(
        ["replacement", "most", "ranking", "p_percent"], ascending=[True, False, True, True]
    )
    lines = [
        "| ranking | replacement | p | neurons that go | rise, searched | as many random ones of every layer | "
        "rise, held out (95 % interval) | verdict | a set that holds there |",
        "| --- | --- | --: | --: | --: | --: | --: | --- | --: |",
    ]
    for row in rows.itertuples():
        cells = [
            f"`{row.ranking}`",
            row.replacement,
            f"{row.p_percent:g} %",
            f"{'' if row.resolved else '≥ '}{row.n_removable:,}",
            f"{row.rise_percent:+.2f} %",
            f"{row.control_percent:+.1f} %{times(row.control_ratio)}",
            f"{row.heldout_percent:+.2f} % ({row.heldout_low:.2f} to {row.heldout_high:.2f})",
            row.verdict,
            "" if pd.isna(row.n_holding) else f"{row.n_holding:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def times(ratio: float) -> str:
    """In words, where both rises are of one sign."""
    return f" ({ratio:.1f} times)" if ratio > 0 else ""


if __name__ == "__main__":
    command(__doc__, PAGE, NAME, table)
