"""The projection by tensor descriptors (bench/gpu_descriptors.py) against float64."""

import json

import pytest
import torch
from tolerances import TOLERANCES, assert_close

from bench import gpu_descriptors
from bench.gpu_descriptors import Projection
from triton_rnn.backends.triton.products import Blocks


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("rows", "size", "columns"), [(70, 24, 40), (128, 64, 64), (3, 8, 8)])
def test_the_projection_by_descriptors(dtype, directions, rows, size, columns):
    point = Projection(dtype, rows, size, columns, directions)
    data = gpu_descriptors.data_of(point, torch.device("cpu"))
    out = gpu_descriptors.by_descriptors(point, data, Blocks(64, 32, 16, 4, 1), "ieee")()
    assert out.shape == (rows, directions, columns)
    for d in range(directions):
        expected = torch.addmm(
            data.biases[d].double(), data.input.double(), data.weights[d].double().t()
        )
        assert_close(out[:, d].double(), expected, tolerance=TOLERANCES[out.dtype])


def test_it_writes_what_it_finds_and_what_failed(tmp_path, monkeypatch):
    blocks = (Blocks(64, 32, 16, 4, 1), Blocks(48, 32, 16, 4, 1))
    monkeypatch.setattr(gpu_descriptors, "blocks_of", lambda itemsize: blocks)
    points = (Projection("float32", 70, 24, 40), Projection("float16", 20, 8, 16, 2))
    # 48 is no power of two.
    assert gpu_descriptors.run(points, torch.device("cpu"), tmp_path) == len(points)
    rows = json.loads((tmp_path / "descriptors.json").read_text())["rows"]
    assert [row["id"] for row in rows] == [point.id for point in points]
    for row in rows:
        statuses = [side["status"] for side in row["sides"].values()]
        assert statuses == ["ok", "ok", "ok", "error"]
    table = (tmp_path / "descriptors.md").read_text()
    assert table.count("64x32x16 w4 s1") == 2
    assert "power" in table
