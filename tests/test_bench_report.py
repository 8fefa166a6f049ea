"""The report: what is in the files stands on the page, and nothing else is taken."""

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, os.fspath(ROOT))

from bench.__main__ import main  # noqa: E402  (needs the path)

EXAMPLES = ROOT / "tests" / "bench_examples"
GROWTH = ROOT / "bench" / "results" / "growth.json"


def report(tmp_path, *files):
    out = tmp_path / "report"
    assert main(["report", *map(os.fspath, files), "--out", os.fspath(out)]) == 0
    return out


def test_exponents_of_the_kept_run_stand_in_its_report(tmp_path):
    text = (report(tmp_path, GROWTH) / "report.md").read_text()
    curves = json.loads(GROWTH.read_text())["curves"]
    assert len(curves) == 60
    for curve in curves:
        assert f"{curve['exponent']:.2f}" in text


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.json")))
def test_every_kind_becomes_markdown_pictures_and_a_page_without_a_network(name, tmp_path):
    out = report(tmp_path, EXAMPLES / name)
    pictures = list(out.glob("*.png"))
    assert pictures
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_the_same_files_give_the_same_report(tmp_path):
    first = (report(tmp_path / "a", GROWTH) / "report.md").read_bytes()
    assert first == (report(tmp_path / "b", GROWTH) / "report.md").read_bytes()


def test_text_of_a_file_is_no_markup(tmp_path):
    content = json.loads(GROWTH.read_text())
    content["machine"]["CPU"] = "<script>alert(1)</script>"
    hostile = tmp_path / "hostile.json"
    hostile.write_text(json.dumps(content))
    page = (report(tmp_path, hostile) / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"kind": "growth"}',
        '{"kind": "growth", "schema": 99}',
        '{"cases": []}',
    ],
    ids=["empty", "truncated", "list", "no kind", "no schema", "unknown schema", "old"],
)
def test_what_is_no_result_is_named_in_one_line(content, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    out = tmp_path / "report"
    assert main(["report", os.fspath(bad), "--out", os.fspath(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert bad.name in lines[0]
    assert not out.exists()
