"""Memory that was never written: `empty` filled with NaN must change no result.

`torch.empty` and its kin are filled by torch itself while algorithms must be deterministic, and so
are those that TorchScript calls as `aten::empty`, which replacing a Python function would miss.
"""

import pytest
import torch
from tolerances import (
    CELLS,
    LAYERS,
    OUTPUTS,
    assert_same_results,
    random,
    random_state,
    run,
    skip_unless_served,
    twins,
)
from torch.nn.utils.rnn import pack_padded_sequence


@pytest.fixture
def poisoned():
    """Every empty floating tensor is full of NaN within the test."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.mark.usefixtures("poisoned")
def test_the_poison_is_there():
    """Without it the tests below would pass whatever the package does."""
    like = torch.ones(2, 3)
    for empty in (
        torch.empty(2, 3),
        torch.empty_like(like),
        like.new_empty(2, 3),
        torch.empty_strided((2, 3), (1, 2)),
    ):
        assert empty.isnan().all()


FORMS = {
    "padded": ((5, 3), lambda input: input),
    "empty_batch": ((5, 0), lambda input: input),
    "one_step": ((1, 3), lambda input: input),
    "packed": (
        (5, 3),
        lambda input: pack_padded_sequence(input, torch.tensor([3, 5, 1]), enforce_sorted=False),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["nohx", "hx"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.usefixtures("poisoned")
def test_no_result_of_a_layer_comes_from_unwritten_memory(backend, kind, form, given, dtype):
    skip_unless_served(backend, dtype)
    _, ours = twins(kind, 3, 5, num_layers=2, bidirectional=True, dtype=dtype)
    shape, prepare = FORMS[form]
    input = random(*shape, 3, dtype=dtype)
    hx = random_state(ours, shape[1]) if given else None
    poisoned = run(ours, input, hx, prepare=prepare)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)
    assert_same_results(poisoned, run(ours, input, hx, prepare=prepare))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "used"), OUTPUTS)
@pytest.mark.usefixtures("poisoned")
def test_no_gradient_of_one_output_alone_comes_from_unwritten_memory(backend, kind, form, used):
    _, ours = twins(kind, 3, 5, num_layers=2, bidirectional=True)
    shape, prepare = FORMS[form]
    input, hx = random(*shape, 3), random_state(ours, shape[1])
    results = run(ours, input, hx, prepare=prepare, used=[used])
    assert all(value is None or value.isfinite().all() for value in results.values())


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"bias": False}], ids=["dropout", "nobias"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.usefixtures("poisoned")
def test_no_result_with_an_option_comes_from_unwritten_memory(backend, kind, options):
    theirs, ours = twins(kind, 3, 5, num_layers=2, batch_first=True, **options)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        results.append(run(module, random(3, 5, 3)))
    assert_same_results(results[1], results[0])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.usefixtures("poisoned")
def test_inference_reads_no_unwritten_memory(backend, kind):
    theirs, ours = twins(kind, 3, 5, num_layers=2, bidirectional=True)
    for shape, prepare in FORMS.values():
        input = prepare(random(*shape, 3))
        with torch.no_grad():
            expected, actual = theirs(input)[0], ours(input)[0]
        if not isinstance(expected, torch.Tensor):
            expected, actual = expected.data, actual.data
        assert_same_results({"output": actual}, {"output": expected})


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.usefixtures("poisoned")
def test_no_result_of_a_cell_comes_from_unwritten_memory(backend, kind):
    theirs, ours = twins(kind, 3, 5)
    for batch in (0, 2):
        for hx in (None, random_state(ours, batch)):
            assert_same_results(run(ours, random(batch, 3), hx), run(theirs, random(batch, 3), hx))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.usefixtures("poisoned")
def test_no_second_derivative_comes_from_unwritten_memory(backend, kind):
    _, ours = twins(kind, 3, 5, bidirectional=True)
    weights = list(ours.parameters())
    first = torch.autograd.grad(
        ours(random(5, 3, 3))[0].square().sum(), weights, create_graph=True, allow_unused=True
    )
    second = torch.autograd.grad(
        sum(gradient.square().sum() for gradient in first), weights, allow_unused=True
    )
    assert all(gradient is None or gradient.isfinite().all() for gradient in second)
