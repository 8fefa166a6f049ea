"""The Triton kernels on the CPU, under Triton's interpreter: tests/interpreter in processes apart.

Triton reads TRITON_INTERPRET when it is first imported, and a process that has it can compile no
kernel; so every file there is a run of pytest of its own, two at a time.
"""

import os
import pathlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux alone")

HERE = pathlib.Path(__file__).parent

# At least so many tests pass in each file: fewer means that pytest did not find them. The longest
# first, so that both processes end at about the same time.
FILES = {
    "test_exchange.py": 90,
    "test_interpreted_layers.py": 200,
    "test_interpreted_autograd.py": 200,
    "test_any_layer.py": 1,
    "test_own_kernels.py": 120,
    "test_extended_layers.py": 60,
    "test_half_by_autocast.py": 30,
    "test_failed_waits.py": 60,
    "test_broken_exchange.py": 20,
    "test_operator.py": 1,
    "test_matrix_products.py": 60,
    "test_first_use.py": 1,
    "test_projection_sides.py": 15,
    "test_cell_arithmetic.py": 40,
}
# Of a file that hangs; the slowest takes one to two minutes.
TIMEOUT_S = 900


def run_interpreted(name):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        # Blocks are so small that more threads only wait for each other.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    # What these would turn on is not what the tests are about.
    for variable in ("TRITON_RNN_BACKEND", "TRITON_RNN_VARIANT", "PYTEST_ADDOPTS"):
        environment.pop(variable, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, str(HERE / "interpreter" / name)],
        cwd=HERE.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.fixture(scope="module")
def runs(request):
    """Runs of the files whose tests were asked for, under way, by name."""
    names = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        yield {name: pool.submit(run_interpreted, name) for name in names}


@pytest.mark.parametrize("name", FILES)
def test_the_kernels_pass_under_the_interpreter(runs, name):
    result = runs[name].result()
    assert result.returncode == 0, f"{name}:\n{result.stdout}"
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) >= FILES[name], result.stdout


def test_every_file_of_interpreted_tests_is_run():
    assert sorted(path.name for path in (HERE / "interpreter").glob("test_*.py")) == sorted(FILES)


def test_no_interpreted_test_is_collected_without_the_interpreter():
    """There every kernel would be launched on CPU tensors, and fail."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", str(HERE / "interpreter")],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, result.stdout + result.stderr
