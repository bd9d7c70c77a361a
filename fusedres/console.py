"""What the command line prints with: rich on a terminal, plain lines of text elsewhere.

rich is imported when something is first printed: importing fusedres needs it not, and a source tree on a machine that
lacks it still prints all there is to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["console", "lacks", "make_table", "stages"]

_PLAIN_WIDTH = 150


class _Console:
    """rich's console, or plain ``print`` where rich is missing."""

    @cached_property
    def rich(self) -> Console | None:
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            return None
        console = Console(highlight=False, markup=False)
        return (
            console
            if console.is_terminal
            else Console(highlight=False, markup=False, width=_PLAIN_WIDTH, no_color=True)
        )

    @property
    def is_terminal(self) -> bool:
        return self.rich is not None and self.rich.is_terminal

    def print(self, what: str | Table = "") -> None:
        if self.rich is None:
            print(what, flush=True)
        else:
            self.rich.print(what)


console = _Console()


@contextmanager
def stages(total: int, title: str) -> Iterator[Callable[[str], None]]:
    """Shows how far a sequence of stages has come; the caller names each one as it begins.

    A bar on a terminal, a line per stage elsewhere.
    """
    if not console.is_terminal:
        yield lambda stage: console.print(f"{title}: {stage}")
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console.rich, transient=True) as progress:
        task = progress.add_task("", total=total, now="")
        started = 0

        def begin(stage: str) -> None:
            nonlocal started
            progress.update(task, completed=started, now=stage)
            started += 1

        yield begin


def make_table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None
) -> Table | str:
    """A table whose first column is text and whose others are numbers."""
    if console.rich is None:
        return _plain_table(title, head, rows, caption)
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _plain_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None) -> str:
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))] for line in lines]
    return "\n".join(part for part in (title, *("  ".join(line).rstrip() for line in aligned), caption) if part)


def lacks(command: str, *packages: str) -> bool:
    """Whether one of ``packages`` is missing; says so, and how to get it."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        console.print(f"{command} needs {', '.join(missing)}: pip install fusedres[demo]")
    return bool(missing)
