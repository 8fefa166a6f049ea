"""What importing the package gives, and what it leaves for later."""

import json
import subprocess
import sys

import pytest

import triton_rnn


def in_a_fresh_process(program):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_what_few_ask_for_is_imported_when_somebody_does():
    before, after = in_a_fresh_process(
        "import json, sys, triton_rnn\n"
        "def late(): return [m for m in sys.modules if m.startswith('triton_rnn.own.')]\n"
        "before = late(); triton_rnn.IndRNN; print(json.dumps([before, late()]))"
    )
    assert before == []
    assert "triton_rnn.own.trace" in after


def test_every_public_name_is_there_however_it_is_asked_for():
    program = (
        "import json\nfrom triton_rnn import *\nimport triton_rnn\n"
        "print(json.dumps([name for name in triton_rnn.__all__ if name in globals()]))"
    )
    assert in_a_fresh_process(program) == triton_rnn.__all__
    assert set(triton_rnn.__all__) <= set(dir(triton_rnn))
    for name in triton_rnn.__all__:
        assert getattr(triton_rnn, name) is getattr(triton_rnn, name)
    assert callable(triton_rnn.explain) and callable(triton_rnn.replace)


def test_a_name_that_is_not_there_is_said_as_python_says_it():
    with pytest.raises(AttributeError, match="module 'triton_rnn' has no attribute 'Gru'"):
        _ = triton_rnn.Gru
    assert not hasattr(triton_rnn, "own_cells")
