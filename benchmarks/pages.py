"""Tables in pages of the documentation that a command makes, between two comments that name them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
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


def command(doc: str | None, page: Path, tables: Callable[[], Mapping[str, str]]) -> None:
    """Print the tables of a page, and put them into it with `--write`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    given, text = parser.parse_args(), page.read_text(encoding="utf-8")
    for name, made in tables().items():
        text = renewed(text, name, made)
        print(f"{name}\n\n{made}\n")
    if given.write:
        page.write_text(text, encoding="utf-8")
