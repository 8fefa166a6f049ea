"""The report as Markdown; pictures are named, and lie beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.report.sections import TITLE, Listing, Paragraph, Picture, Section, Table

# An underscore within a word is plain text in every Markdown that knows tables.
_SPECIAL = re.compile(r"([\\`*\[\]<>|#&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def escape(text: str) -> str:
    """Text on one line that no Markdown reader takes for markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def to_markdown(sections: Sequence[Section]) -> str:
    lines = [f"# {TITLE}"]
    for section in sections:
        lines += ["", f"{'#' * section.level} {escape(section.title)}"]
        for block in section.blocks:
            lines += ["", *_block(block)]
    return "\n".join(lines) + "\n"


def _block(block: Paragraph | Listing | Table | Picture) -> list[str]:
    if isinstance(block, Paragraph):
        return [escape(block.text)]
    if isinstance(block, Listing):
        return [f"- {escape(item)}" for item in block.items]
    if isinstance(block, Table):
        rule = ["---" if index in block.text else "---:" for index in range(len(block.header))]
        return [
            f"**{escape(block.caption)}**",
            "",
            _row([escape(cell) for cell in block.header]),
            _row(rule),
            *(_row([escape(cell) for cell in row]) for row in block.rows),
        ]
    return [f"![{escape(block.alt)}]({block.name})", "", escape(block.caption)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
