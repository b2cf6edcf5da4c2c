"""A progress bar on stderr, with rate and time left; nothing where stderr is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from neuron_sparsity.terminal import printable

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(show: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Yield `f(label, done, total)` in tokens, one bar a label; None if nothing is to be shown."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description:<34}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rate]:>14}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    current: list[tuple[str, TaskID, float, int]] = []

    def update(label: str, done: int, total: int) -> None:
        if not current or current[0][0] != label or done <= current[0][3]:
            if current and current[0][0].startswith("loading"):
                bar.update(current[0][1], total=1, completed=1)
            task = bar.add_task(printable(label), total=total or None, completed=done, rate="")
            current[:] = [(label, task, time.monotonic(), done)]
        _, task, start, first = current[0]
        seconds, new = time.monotonic() - start, done - first
        bar.update(task, completed=done, rate=f"{new / seconds:,.0f} tokens/s" if new and seconds > 0 else "")

    with bar:
        yield update
