"""How the benchmarks write for people: one style of tables, and nothing that is cut off.

A table is as wide as its cells. Where a terminal is narrower, columns are left out, and named;
where there is no terminal (a pipe, a file), every table has room.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

WIDEST = 1000  # of a table
PARAGRAPH = 100  # of text, also where there is more room


def make_console(file: TextIO | None = None) -> Console:
    """The terminal with its width; a pipe or a file with room for every table."""
    if file is None and (terminal := Console()).is_terminal:
        return terminal
    return Console(file=file, width=WIDEST, force_terminal=False)


def progress_bar(auto_refresh: bool = True) -> Progress:
    """A bar for those who wait: on stderr, gone when it is done, nothing where no terminal is."""
    columns = (TextColumn("{task.description:17}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    return Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        auto_refresh=auto_refresh,
        transient=True,
        disable=not console.is_terminal,
    )


def simple_table(title: str, caption: str = "") -> Table:
    """The one style of all tables."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )


def say(console: Console, text: str, style: str = "") -> None:
    """A paragraph."""
    width = min(console.width, PARAGRAPH)
    console.print(text, style=style, markup=False, highlight=False, width=width)


def name_file(console: Console, what: str, path: Path) -> None:
    """What is in a file; the line is not broken, so that the name can be copied."""
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)


def show(console: Console, *tables: Table) -> None:
    """Tables, without some columns where they are wider than the console.

    Those go first that say the same in every row, then the last.
    """
    for table in tables:
        for column in table.columns:
            _as_wide_as_its_cells(column)
        every = list(table.columns)
        while len(table.columns) > 1 and _width(console, table) > console.width:
            table.columns.remove(next(filter(_says_nothing, table.columns), table.columns[-1]))
        console.print(table)
        if left_out := [column for column in every if column not in table.columns]:
            heads = ", ".join(" ".join(str(column.header).split()) for column in left_out)
            say(console, f"Left out here, for a wider terminal: {heads}.", "dim")


def _as_wide_as_its_cells(column: Column) -> None:
    """Breaks the head between words, where it is the widest; what is to be folded stays so."""
    if column.overflow == "fold":
        return
    widths = [Text.from_markup(str(cell)).cell_len for cell in column.cells]
    words = str(column.header).split()
    width = max([*widths, *map(len, words), 1])
    column.header = textwrap.fill(str(column.header), width, break_long_words=False)
    column.no_wrap = True


def _says_nothing(column: Column) -> bool:
    cells = list(column.cells)
    return len(cells) > 1 and len(set(cells)) == 1


def _width(console: Console, table: Table) -> int:
    options = console.options.update_width(WIDEST)
    return console.measure(table, options=options).maximum
