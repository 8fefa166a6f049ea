"""Users' cells on the generated kernels, against their definition in float64."""

import itertools

import pytest
import torch
from compare import EXCHANGES, exchanging, hidden_size, pack, tiled
from own_cells import MinimalGatedUnit, OwnGRU, PeepholeLSTM, ThreeStates, Uneven
from own_operations import CORNERS, ONE
from threads import AtRandom, Threads
from tolerances import TOLERANCES, assert_close, leaf, random
from torch.nn.utils.rnn import PackedSequence

import triton_rnn
from triton_rnn import dispatch
from triton_rnn.backends.triton import check, launch, own, products, rules
from triton_rnn.kernels.chips import CHIPS
from triton_rnn.kernels.planner import plan
from triton_rnn.request import Request

CPU = torch.device("cpu")
CELLS = (PeepholeLSTM, MinimalGatedUnit, triton_rnn.CoupledLSTM, triton_rnn.IndRNN, Uneven)
EVERY_CELL = pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.__name__)


def module_of(kind, *sizes, dtype=torch.float32, **options):
    """A module in a dtype and its like in float64, with the same weights."""
    torch.manual_seed(1)
    ours = kind(*sizes, dtype=dtype, **options)
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if kind is triton_rnn.IndRNN:
                # Its relu turns at zero, where rounding decides: half of the units are always on,
                # the others off.
                weight.abs_()
                if "bias_ih" in name:
                    weight[1::2] = -100
    exact = kind(*sizes, dtype=torch.float64, **options)
    exact.load_state_dict(ours.state_dict())
    return ours, exact


def results(module, backend, input, states, prepare=lambda input: input):
    """Every output and gradient, by name."""
    dtype = module.weight_ih_l0.dtype
    input, states = leaf(input.to(dtype)), [leaf(state.to(dtype)) for state in states]
    with triton_rnn.use_backend(backend):
        hx = None if not states else states[0] if len(states) == 1 else tuple(states)
        output, last = module(prepare(input), hx)
    if isinstance(output, PackedSequence):
        output = output.data
    outputs = [output, *(last if isinstance(last, tuple) else (last,))]
    # Rounded alike on both sides.
    grads = [random(*o.shape, seed=10 + i).half().to(dtype) for i, o in enumerate(outputs)]
    named = {"input": input, **{f"state {i}": state for i, state in enumerate(states)}}
    named |= dict(module.named_parameters())
    found = torch.autograd.grad(
        outputs, list(named.values()), grads, allow_unused=True, materialize_grads=True
    )
    values = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return values | dict(zip(named, found, strict=True))


def assert_the_definition(ours, exact, *shape, batch, given=True, prepare=lambda input: input):
    dtype = ours.weight_ih_l0.dtype
    rows = ours.num_layers * (2 if ours.bidirectional else 1)
    input = random(*shape, ours.input_size, dtype=dtype)
    states = [
        random(rows, batch, ours.hidden_size, seed=1 + s, dtype=dtype)
        for s in range(ours.cell.states * given)
    ]
    if isinstance(ours, triton_rnn.IndRNN):
        input, states = input.abs(), [state.abs() for state in states]
    expected = results(exact, "reference", input, states, prepare)
    actual = results(ours, "triton", input, states, prepare)
    for name, value in expected.items():
        assert actual[name].dtype == dtype
        assert_close(actual[name].double(), value, name, TOLERANCES[dtype])
    return actual


FORMS = [
    {"bidirectional": True, "bias": True, "form": "packed", "dtype": torch.float32},
    {"bidirectional": False, "bias": False, "form": "padded", "dtype": torch.float32},
    {"bidirectional": True, "bias": True, "form": "padded", "dtype": torch.float16},
    {"bidirectional": False, "bias": True, "form": "packed", "dtype": torch.float16},
]


def forced(monkeypatch, variant, kind, **how):
    """Launch by a variant; a cell without a product knows one alone."""
    if kind.cell.products == 0:
        tiled(monkeypatch, 1)
    elif variant in EXCHANGES:
        exchanging(monkeypatch, *EXCHANGES[variant], **how)
        Threads(monkeypatch, lambda: AtRandom(3))
    else:
        monkeypatch.setattr(launch, "variant", variant)


VARIANTS = ("resident", "stepwise", *EXCHANGES)
CALLS = [
    (kind, variant, FORMS[(number + place) % len(FORMS)])
    for number, kind in enumerate(CELLS)
    for place, variant in enumerate(VARIANTS[: None if kind.cell.products else 1])
]
# What runs in one go, in all forms.
CALLS += [(kind, "resident", form) for kind in CELLS for form in FORMS]


@pytest.mark.parametrize(
    ("kind", "variant", "form"),
    [
        pytest.param(kind, variant, form, id=f"{kind.__name__}-{variant}-{FORMS.index(form)}")
        for kind, variant, form in {(k, v, id(f)): (k, v, f) for k, v, f in CALLS}.values()
    ],
)
def test_outputs_and_gradients_are_the_definitions(monkeypatch, kind, variant, form):
    forced(monkeypatch, variant, kind)
    how = dict(form)
    prepare = pack([3, 2, 1]) if how.pop("form") == "packed" else lambda input: input
    ours, exact = module_of(kind, 5, hidden_size(variant, how["dtype"]), **how)
    assert_the_definition(ours, exact, 3, 3, batch=3, prepare=prepare)


class FewerProducts(triton_rnn.Recurrent, gates=2, products=1):
    """W_hh h goes to the second of two gates."""

    @staticmethod
    def step(input, hidden, state):
        z, n = torch.sigmoid(input[0]), torch.tanh(input[1] + hidden[0])
        return (1 - z) * state[0] + z * n


class MoreProducts(triton_rnn.Recurrent, gates=1, products=2):
    @staticmethod
    def step(input, hidden, state):
        z, n = torch.sigmoid(hidden[1]), torch.tanh(input[0] + hidden[0])
        return (1 - z) * state[0] + z * n


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [*CELLS, FewerProducts, MoreProducts], ids=lambda k: k.__name__)
def test_projections_by_cublas_are_the_definitions(monkeypatch, kind, bias):
    """As large ones are on a GPU: any one direction whose input lies in rows."""

    def lies_in_rows(input, count, in_rows):
        return in_rows and input.is_contiguous()

    monkeypatch.setattr(products, "_is_for_cublas", lies_in_rows)
    ours, exact = module_of(kind, 5, 12, bias=bias)
    assert_the_definition(ours, exact, 3, 3, batch=3)


# T, N, I, H: one of each, and more than one block.
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 17, 3, 3), (2, 3, 40, 33)], ids=str)
@EVERY_CELL
def test_odd_sizes_are_the_definitions(kind, sizes):
    seq_len, batch, input_size, hidden_size = sizes
    ours, exact = module_of(kind, input_size, hidden_size, bidirectional=seq_len > 1)
    assert_the_definition(ours, exact, seq_len, batch, batch=batch, given=batch > 1)


@pytest.mark.parametrize("kind", [PeepholeLSTM, triton_rnn.IndRNN], ids=lambda kind: kind.__name__)
def test_layers_on_top_of_others_in_several_batch_blocks_are_the_definitions(monkeypatch, kind):
    tiled(monkeypatch, 2, 1)
    ours, exact = module_of(kind, 5, 9, num_layers=2, bidirectional=True, bias=False)
    assert_the_definition(ours, exact, 2, 35, batch=35, prepare=pack([1] * 16 + [2] * 19))


def test_two_to_eight_products_are_taken_apart_in_their_order(monkeypatch):
    """Each by a factor of its own, through the merged product of programs side by side."""
    for count in (2, 3, 4, 5, 8):

        class Counted(triton_rnn.Recurrent, gates=1, products=count):
            @staticmethod
            def step(input, hidden, state):
                total = sum(2.0**-i * part for i, part in enumerate(hidden))
                return torch.tanh(input[0] + 0.5 * total)

        ours, exact = module_of(Counted, 3, 9)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "variant", "stepwise")
            assert_the_definition(ours, exact, 2, 2, batch=2)


# Arithmetic


@pytest.mark.parametrize("name", ONE)
def test_an_operation_and_its_derivative_are_torchs(name):
    """Of every corner by itself, at which other numbers are larger by far."""
    function = ONE[name]

    class Operation(triton_rnn.Recurrent, gates=1, products=0):
        @staticmethod
        def step(input, hidden, state):
            return function(state[0]) + input[0]

    ours, exact = module_of(Operation, 1, len(CORNERS), bias=False)
    h_0 = torch.tensor(CORNERS).view(1, 1, -1)
    found = []
    for module, backend in ((ours, "triton"), (exact, "reference")):
        dtype = module.weight_ih_l0.dtype
        state = leaf(h_0.to(dtype))
        with triton_rnn.use_backend(backend):
            output, _ = module(torch.zeros(1, 1, 1, dtype=dtype), state)
        (grad,) = torch.autograd.grad(output.sum(), state)
        found.append((output.detach().double(), grad.double()))
    for actual, expected in zip(*found, strict=True):
        # eps of float32 is 1.2e-7; a handful of roundings, of numbers of up to 60 in between.
        error = (actual - expected).abs() / expected.abs().clamp_min(1)
        assert error.max() <= 2e-5, dict(zip(CORNERS, error.flatten().tolist(), strict=True))


@pytest.mark.parametrize("name", ["expm1", "log1p"])
def test_functions_near_zero_are_good_relative_to_themselves(name):
    function = getattr(torch, name)

    class Operation(triton_rnn.Recurrent, gates=1, products=0):
        @staticmethod
        def step(input, hidden, state):
            return function(state[0])

    x = torch.logspace(-12, -0.01, 40, dtype=torch.float64).float()
    x = torch.cat([-x, torch.zeros(1), x])
    with triton_rnn.use_backend("triton"):
        output, _ = Operation(1, 81, bias=False)(torch.zeros(1, 1, 1), x.view(1, 1, -1))
    expected = function(x.double())
    error = (output.flatten().double() - expected).abs() / expected.abs().clamp_min(1e-30)
    # Two units of the last place, or three.
    assert error.max() <= 4e-7


def test_what_was_true_in_the_forward_is_true_in_the_backward():
    """What is kept in float16 is rounded to the other side of the threshold."""
    x, threshold = 0.5, 1.6486
    exact = torch.tensor(x).exp()
    assert exact.item() > threshold > exact.half().item()

    class Bent(triton_rnn.Recurrent, gates=1, products=0):
        @staticmethod
        def step(input, hidden, state):
            return torch.relu(torch.exp(input[0]) - threshold) + 0 * state[0]

    module = Bent(1, 4, bias=False, dtype=torch.float16)
    torch.nn.init.constant_(module.weight_ih_l0, x)
    with triton_rnn.use_backend("triton"):
        output, _ = module(torch.ones(1, 1, 1, dtype=torch.float16))
        output.sum().backward()
    assert output.gt(0).all()
    assert module.weight_ih_l0.grad.gt(1.6).all()


def test_constants_and_numbers_of_a_unit_alone_fill_their_blocks():
    """What does not depend on a row has the shape of one all the same."""

    class Constant(triton_rnn.Recurrent, gates=2, states=2, unit_weights=1):
        @staticmethod
        def step(input, hidden, state, unit):
            zero = torch.zeros_like(state[1])
            return input[0] + 0.5 * hidden[0], torch.sigmoid(unit[0]) + zero

    ours, exact = module_of(Constant, 3, 5)
    actual = assert_the_definition(ours, exact, 2, 3, batch=3)
    assert not actual["state 1"].any()


# Texts


def test_gradients_of_products_and_of_inputs_lie_together():
    assert own.layout((0, 1, 2, 3), (0, 1, 2, 3)) == (0, (0, 1, 2, 3))
    # A GRU's: m, r, z, n.
    assert own.layout((0, 1, 2), (0, 1, 3)) == (2, (3, 0, 1, 2))
    assert own.layout((0, 1), (2, 3)) == (0, (2, 3, 0, 1))
    assert own.layout((0,), ()) == (0, (0,))
    # Fewer products than inputs, and more.
    assert own.layout((0, 1, 2), (0, 1)) == (0, (0, 1, 2))
    assert own.layout((1,), (0, 1, 2)) == (2, (2, 0, 1))


def test_the_chain_of_a_users_gru_is_as_short_as_torchs():
    made, torchs = own.kernel_cell(OwnGRU.cell), launch.KERNEL_CELLS["gru"]
    assert (made.width, made.turn, made.saved) == (torchs.width, torchs.turn, torchs.saved)
    assert made.starts == torchs.starts


# Choices


def request_of(kind, **changes):
    made = Request(kind.cell, CPU, torch.float32, 3, 2, 16, 20, 20, 2, True, False, True)
    return made._replace(**changes)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@EVERY_CELL
def test_the_check_of_first_use_passes_right_kernels(kind, packed):
    assert check.compare(request_of(kind, packed=packed, biased=not packed)) < 1e-5


def test_the_check_of_first_use_finds_a_lost_factor(monkeypatch):
    kept = own.kernel_cell

    class Wrong(triton_rnn.Recurrent, gates=1):
        @staticmethod
        def step(input, hidden, state):
            return torch.tanh(0.9 * input[0] + hidden[0])

    class Right(triton_rnn.Recurrent, gates=1):
        @staticmethod
        def step(input, hidden, state):
            return torch.tanh(input[0] + hidden[0])

    other = kept(Wrong.cell)
    assert check.compare(request_of(Right)) < 1e-5
    monkeypatch.setattr(own, "kernel_cell", lambda cell: other)
    launch._ready.cache_clear()
    assert check.compare(request_of(Right)) > 10 * check._TOLERANCES[torch.float32]


def test_auto_takes_the_kernels_for_every_users_cell_on_a_gpu(monkeypatch):
    def on_h200(request, kernel):
        cell = launch.kernel_cell(request.cell)
        return plan(
            launch.shape_of(cell, kernel, request.hidden_size, 2, request.batch, 2, 1),
            CHIPS["H200"],
        )

    monkeypatch.setattr(launch, "plan_of", on_h200)
    for kind, size in itertools.product(CELLS, (20, 256, 1024, 2048)):
        asked = request_of(kind, hidden_size=size, output_size=size)
        assert rules.slower_than_torch(asked) is None
        assert check.obstacle(asked) is None


def test_more_than_two_states_are_refused_with_the_reason():
    reason = dispatch.backend_module("triton").supports(request_of(ThreeStates))
    assert reason == "the Triton kernels carry one or two states, ThreeStates has more"


def test_explain_tells_the_plan_of_a_users_cell():
    with triton_rnn.use_backend("triton"):
        told = triton_rnn.explain(triton_rnn.IndRNN(3, 5), torch.zeros(4, 2, 3))
    assert told.backend == "triton"
    assert "forward: independent" in told.plan[0] and "backward: independent" in told.plan[0]


# What else a layer owes


def test_second_derivatives_are_the_definitions():
    ours, exact = module_of(PeepholeLSTM, 3, 5)
    found = []
    for module, backend in ((ours, "triton"), (exact, "reference")):
        x = leaf(random(2, 2, 3, dtype=module.weight_ih_l0.dtype))
        with triton_rnn.use_backend(backend):
            output, _ = module(x)
        (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        inputs = [x, *module.parameters()]
        found.append(torch.autograd.grad(grad.square().sum(), inputs))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual.double(), expected, tolerance=TOLERANCES[torch.float32])


def test_only_wanted_gradients_are_made():
    module = PeepholeLSTM(3, 5)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == "weight_unit_l0")
    with triton_rnn.use_backend("triton"):
        module(random(2, 2, 3, dtype=torch.float32))[0].sum().backward()
    assert [p.grad is not None for p in module.parameters()] == [False] * 4 + [True]


def test_a_nan_stays_in_its_own_sequence_and_nothing_unwritten_is_read(poisoned):
    module = Uneven(3, 10)
    x = random(4, 3, 3, dtype=torch.float32)
    x[2, 1, 0] = float("nan")
    x.requires_grad_()
    with triton_rnn.use_backend("triton"):
        output, _ = module(x)
        output[:, [0, 2]].sum().backward()
    bad = output.isnan()
    assert not bad[:, [0, 2]].any() and not bad[:2].any()
    assert bad[2:, 1].all()
    assert not x.grad[:, [0, 2]].isnan().any()
