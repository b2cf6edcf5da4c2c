"""Tables in pages of the documentation that a command makes, between two comments that name them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def shown(page: str, name: str) -> str:
    """Return the table of this name that the text of a page holds now."""
    return page[slice(*_place(page, name))].strip()


def renewed(page: str, name: str, table: str) -> str:
    """Return the text of a page with another table between the two comments, and nothing else changed."""
    start, end = _place(page, name)
    return f"{page[:start]}\n\n{table}\n\n{page[end:]}"


def _place(page: str, name: str) -> tuple[int, int]:
    before, after = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    return page.index(before) + len(before), page.index(after)


def command(doc: str | None, page: Path, name: str, table: Callable[[], str]) -> None:
    """Print a table, and put it into its page with `--write`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    given, made = parser.parse_args(), table()
    if given.write:
        text = page.read_text(encoding="utf-8")
        page.write_text(renewed(text, name, made), encoding="utf-8")
    print(made)
