"""Tables on the console."""

from __future__ import annotations

from typing import Any

from ..training.extras import require


def make_table(title: str, *headings: str) -> Any:
    """A rich table: the first column to the left, the others to the right, folded where they are too wide."""
    rich_table = require("rich.table", "demo", "the command line")
    # Without vertical lines a Llama's seven modules fit on 80 columns.
    table = rich_table.Table(title=title, title_justify="left", box=rich_table.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    return table
