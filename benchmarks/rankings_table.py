"""The tables of docs/results/ablation.md, one a text, from the rows that `benchmarks.rankings --save` has left.

python -m benchmarks.rankings_table            prints the tables
python -m benchmarks.rankings_table --write    puts them into docs/results/ablation.md
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks.harness import RESULTS
from benchmarks.pages import DOCS, command

PAGE = DOCS / "results" / "ablation.md"
TEXTS = {"sotu": "sotu"}
"""What a text is called in the names of its tables -> what its rows call it."""


def tables() -> dict[str, str]:
    """Return, for each text, how many neurons go at a glance, and the table of everything, by name."""
    rows = pd.read_csv(RESULTS / "rankings.csv")
    made = {}
    for name, text in TEXTS.items():
        found = rows[rows["corpus"] == text]
        made |= {f"at a glance, {name}": glance(found), f"all rows, {name}": table(found)}
    return made


def glance(rows: pd.DataFrame) -> str:
    """Return a table in Markdown: neurons that go, a row for each ranking, a column for each replacement and p."""
    most = rows.groupby(["replacement", "p_percent"])["n_removable"].transform("max")
    rows = rows.assign(
        column=[f"{row.replacement}, {row.p_percent:g} %" for row in rows.itertuples()],
        shown=[
            f"**{count(row)}**" if row.n_removable == best else count(row)
            for row, best in zip(rows.itertuples(), most, strict=True)
        ],
    )
    order = rows.groupby("ranking")["n_removable"].max().sort_values(ascending=False, kind="stable").index
    columns = [f"{replacement}, {p:g} %" for replacement in ("mean", "zero", "resample") for p in (1, 5)]
    columns = [column for column in columns if column in set(rows["column"])]
    wide = rows.pivot(index="ranking", columns="column", values="shown").loc[order, columns].fillna("")
    lines = [f"| ranking | {' | '.join(columns)} |", f"| --- |{' --: |' * len(columns)}"]
    return "\n".join(lines + [f"| `{name}` | {' | '.join(cells)} |" for name, *cells in wide.itertuples()])


def count(row: Any) -> str:
    """Return the neurons that go, marked where more may."""
    return f"{'' if row.resolved else '≥ '}{row.n_removable:,}"


def table(rows: pd.DataFrame) -> str:
    """Return a table in Markdown: a row for each ranking, replacement and p, those that remove most first."""
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
            count(row),
            f"{row.rise_percent:+.2f} %",
            *beside(row),
            "" if pd.isna(row.n_holding) else f"{row.n_holding:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def beside(row: Any) -> tuple[str, str, str]:
    """Return the cells of the control and of the held-out text; where no neuron goes there is neither."""
    if not row.n_removable:
        return "", "", ""
    ratio = f" ({row.control_ratio:.1f} times)" if row.control_ratio > 0 else ""  # where both rises are of one sign
    held_out = f"{row.heldout_percent:+.2f} % ({row.heldout_low:.2f} to {row.heldout_high:.2f})"
    return f"{row.control_percent:+.1f} %{ratio}", held_out, row.verdict


if __name__ == "__main__":
    command(__doc__, PAGE, tables)
