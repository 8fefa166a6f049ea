"""The report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import itertools
import struct
from collections.abc import Sequence
from pathlib import Path

import jinja2

from bench.report.sections import TITLE, Picture, Section

# Cells that are a verdict have a colour beside the word.
_VERDICTS = {
    "faster": "good",
    "better": "good",
    "yes": "good",
    "slower": "bad",
    "worse": "bad",
    "no": "bad",
    "failed": "bad",
}


def to_page(sections: Sequence[Section]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        # All text of the files is escaped; the template marks nothing as safe.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["verdict"] = lambda cell: _VERDICTS.get(cell, "")
    # Neighbours of one kind are laid out together: pictures share a grid.
    environment.filters["groupby_run"] = lambda blocks: [
        (kind, list(members))
        for kind, members in itertools.groupby(blocks, key=lambda block: type(block).__name__)
    ]
    template = environment.get_template("page.html")
    return template.render(title=TITLE, sections=sections, size_of=png_size, data_of=_data) + "\n"


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height, which PNG keeps at the beginning of its first chunk."""
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def _data(picture: Picture) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode('ascii')}"
