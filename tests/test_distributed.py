"""Training over two processes, with DDP and with FSDP2, is training on the joined batch."""

from __future__ import annotations

import pytest
import torch
from processes import needs_gloo, torchrun
from tolerances import TOLERANCES, largest_error

import triton_rnn

pytestmark = needs_gloo

# The cases take DDP and FSDP from torch, which may be built without.
worker = pytest.importorskip("distributed_worker", exc_type=ImportError)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What every rank wrote, by case: one pair of processes serves all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    code, output, errors = torchrun(worker.__file__, str(folder))
    assert code == 0, f"{output}\n{errors}"
    return [
        {
            name: worker.Outcome(**fields)
            for name, fields in torch.load(folder / f"{rank}.pt").items()
        }
        for rank in range(worker.PROCESSES)
    ]


def alone(library, case):
    """The same training in this process, on joined batches."""
    model = worker.build(library, case)
    with worker.watched() as seen:
        losses = worker.train(model, model)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    return worker.Outcome([float(loss) for loss in losses], parameters, seen)


def differences(found, expected):
    """Of every parameter, and of the losses."""
    assert found.parameters.keys() == expected.parameters.keys()
    errors = {
        name: largest_error(found.parameters[name], value)
        for name, value in expected.parameters.items()
    }
    assert len(found.losses) == len(expected.losses) == worker.STEPS
    both = torch.tensor([found.losses, expected.losses], dtype=torch.float64)
    return {**errors, "losses": largest_error(*both)}


@pytest.mark.parametrize("case", worker.CASES, ids=lambda case: case.id)
def test_two_processes_train_as_torch_nn_does_alone_on_the_joined_batch(case, outcomes):
    expected = alone(torch.nn, case)
    first = worker.build(torch.nn, case).state_dict()
    for rank in outcomes:
        found = differences(rank[case.id], expected)
        # Sums over the batch are made in halves and then joined; after three steps that was seen to
        # be 5e-16 and 2e-7. Written so that a NaN fails.
        assert all(error <= TOLERANCES[case.dtype] for error in found.values()), found
    # Every parameter has moved, by far more than the tolerance.
    moved = {name: largest_error(first[name], end) for name, end in expected.parameters.items()}
    assert min(moved.values()) > 1e-3


@pytest.mark.parametrize("case", worker.CASES, ids=lambda case: case.id)
def test_our_forward_answers_in_two_processes_as_it_does_alone(case, outcomes):
    expected = alone(triton_rnn, case).answered_by
    assert len(expected) == 1 and "torch.nn" not in expected
    for rank in outcomes:
        assert rank[case.id].answered_by == expected


@pytest.mark.parametrize("case", worker.CASES, ids=lambda case: case.id)
def test_fsdp_shards_every_parameter_and_ddp_none(case, outcomes):
    for rank in outcomes:
        every = rank[case.id].parameters.keys()
        assert rank[case.id].sharded == (every if case.style == "fsdp" else set())


def test_gradients_that_are_not_shared_would_be_seen(outcomes):
    expected = alone(torch.nn, worker.UNSHARED)
    for rank in outcomes:
        found = differences(rank[worker.UNSHARED.id], expected)
        assert all(error > 1e-3 for error in found.values()), found
