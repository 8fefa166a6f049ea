"""The projection by larger blocks and by descriptors (bench/gpu_projection.py) against float64."""

import json

import pytest
import torch
from tolerances import TOLERANCES, assert_close

from bench import gpu_projection
from bench.gpu_projection import Projection
from triton_rnn.backends.triton import products
from triton_rnn.backends.triton.products import Blocks


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("rows", "size", "columns"), [(70, 24, 40), (128, 64, 64), (3, 8, 8)])
def test_the_projection_by_descriptors(dtype, directions, rows, size, columns):
    point = Projection(dtype, rows, size, columns, directions)
    data = gpu_projection.data_of(point, torch.device("cpu"))
    out = gpu_projection.by_descriptors(point, data, Blocks(64, 32, 16, 4, 1), "ieee")()
    assert out.shape == (rows, directions, columns)
    for d in range(directions):
        expected = torch.addmm(
            data.biases[d].double(), data.input.double(), data.weights[d].double().t()
        )
        assert_close(out[:, d].double(), expected, tolerance=TOLERANCES[out.dtype])


def test_larger_blocks_are_what_runs(monkeypatch):
    point, asked = Projection("float32", 70, 24, 40, 2), Blocks(16, 32, 8, 4, 1)
    data = gpu_projection.data_of(point, torch.device("cpu"))
    call = gpu_projection.by_matmul(point, data)
    ran = []
    launcher = products.Launcher

    def watched(kernel, constants, options):
        ran.append((constants["BLOCK_M"], constants["BLOCK_N"], constants["BLOCK_K"]))
        return launcher(kernel, constants, options)

    monkeypatch.setattr(products, "Launcher", watched)
    products._ready.cache_clear()
    expected = call()
    with gpu_projection.by_blocks(asked):
        actual = call()
    call()
    assert ran == [(64, 64, 64), (16, 32, 8), (64, 64, 64)]
    assert_close(actual, expected, tolerance=TOLERANCES[torch.float32])


def test_what_all_programs_read():
    # 2 x 2 programs of each direction read 16 rows and 32 columns of 24 numbers of 2 bytes.
    point = Projection("float16", 20, 24, 40, 2)
    assert gpu_projection.read(point, Blocks(16, 32, 8, 4, 1), 2) == 2 * 4 * (16 + 32) * 24 * 2


def test_it_writes_what_it_finds_and_what_failed(tmp_path, monkeypatch):
    larger = (Blocks(32, 64, 16, 4, 1),)
    blocks = (Blocks(64, 32, 16, 4, 1), Blocks(48, 32, 16, 4, 1))
    monkeypatch.setattr(gpu_projection, "larger_blocks", lambda itemsize: larger)
    monkeypatch.setattr(gpu_projection, "blocks_of", lambda itemsize: blocks)
    points = (Projection("float32", 70, 24, 40), Projection("float16", 20, 8, 16, 2))
    # 48 is no power of two.
    assert gpu_projection.run(points, torch.device("cpu"), tmp_path) == len(points)
    rows = json.loads((tmp_path / "projection.json").read_text())["rows"]
    assert [row["id"] for row in rows] == [point.id for point in points]
    for row in rows:
        statuses = [side["status"] for side in row["sides"].values()]
        assert statuses == ["ok", "ok", "ok", "ok", "error"]
        assert row["sides"]["today"]["read_bytes"] > 0
    table = (tmp_path / "projection.md").read_text()
    assert table.count("matmul 32x64x16 w4 s1") == table.count("descriptors 64x32x16 w4 s1") == 2
    assert table.count("TB/s") == 2
    assert "power" in table
