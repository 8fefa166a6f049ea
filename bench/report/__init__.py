"""``python -m bench report``: what stored runs say, as Markdown, pictures and one HTML page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bench.machine import CommandError
from bench.report.load import load_all
from bench.report.markdown import to_markdown
from bench.report.page import to_page
from bench.report.sections import Picture, build


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE.json",
        help="stored runs of kind cases, growth or scaling; several are laid side by side",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench-report"),
        metavar="FOLDER",
        help="where report.md, report.html and the pictures go (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Write the report; all files are read and all content is made before the first is written."""
    sections = build(load_all(options.files))
    pictures = [
        block for section in sections for block in section.blocks if isinstance(block, Picture)
    ]
    files = {picture.name: picture.png for picture in pictures}
    files["report.md"] = to_markdown(sections).encode()
    files["report.html"] = to_page(sections).encode()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _write(options.out / name, content)
    except OSError as error:
        # The text of an OSError is one line; the folder's name may be anything.
        raise CommandError(" ".join(f"cannot write the report: {error}".split())) from error
    print(f"{options.out / 'report.html'}, report.md and {len(pictures)} pictures are written")
    return 0


def _write(path: Path, content: bytes) -> None:
    """All of the file or none of it: a reader never sees a half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
