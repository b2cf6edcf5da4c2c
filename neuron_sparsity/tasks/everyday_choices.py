"""The rows of `everyday_choices`, for lm-eval: read from the file beside this one, no cache and no hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["rows"]


def rows(**metadata: Any) -> dict[str, Any]:
    """Return `{"test": Dataset}` with the columns kind, context, choices and answer (the index of the right choice).

    Args:
        metadata: What lm-eval passes to every data set of this kind; not used.
    """
    from datasets import Dataset

    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
