"""What the command line prints with: rich on a terminal, plain lines of text elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["console", "lacks", "make_table", "stages"]

_PLAIN_WIDTH = 150

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=_PLAIN_WIDTH, no_color=True)


@contextmanager
def stages(total: int, title: str) -> Iterator[Callable[[str], None]]:
    """Shows how far a sequence of stages has come; the caller names each one as it begins.

    A bar on a terminal, a line per stage elsewhere.
    """
    if not console.is_terminal:
        yield lambda stage: console.print(f"{title}: {stage}")
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, now="")
        started = 0

        def begin(stage: str) -> None:
            nonlocal started
            progress.update(task, completed=started, now=stage)
            started += 1

        yield begin


def make_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def lacks(command: str, *packages: str) -> bool:
    """Whether one of ``packages`` is missing; says so, and how to get it."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        console.print(f"{command} needs {', '.join(missing)}: pip install fusedres\\[demo]")
    return bool(missing)
