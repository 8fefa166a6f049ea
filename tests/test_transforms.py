"""What torch does to a module's call: torch.func, autocast, scaling, checkpoints, graph hooks."""

import contextlib
import warnings

import pytest
import torch
from tolerances import assert_close, flat_outputs, random, random_state, run, twins
from torch.autograd.functional import hvp, jacobian
from torch.func import functional_call, grad, hessian, jvp, linearize, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import triton_rnn

LAYERS = ("rnn_tanh", "rnn_relu", "gru", "lstm", "lstm_proj")
CELLS = ("rnn_tanh_cell", "gru_cell", "lstm_cell")
KINDS = (*LAYERS, *CELLS)
# Sums of products of derivatives, whose terms are larger than they.
SECOND = 1e-11

pytestmark = [
    # torch's own forward derivatives use it, and its operators have slow batching rules.
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    # torch.func.linearize says this of the graph that it makes itself.
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]


def input_of(kind, dtype=torch.float64):
    return random(*((2, 3) if kind in CELLS else (4, 2, 3)), dtype=dtype)


def first(module, *args):
    return next(iter(flat_outputs(module, module(*args)).values()))


def called(module, weights, *args):
    """The outputs of a call with other weights, one after the other."""
    return list(flat_outputs(module, functional_call(module, weights, args)).values())


def weights_of(module):
    return {name: value.detach() for name, value in module.named_parameters()}


def loss_of(module):
    return lambda weights, *args: sum(out.square().sum() for out in called(module, weights, *args))


def assert_all_close(actual, expected, tolerance=None):
    for mine, torchs in zip(actual, expected, strict=True):
        assert_close(mine, torchs, tolerance=tolerance)


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


@contextlib.contextmanager
def quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- torch.func and torch.autograd.functional.


@pytest.mark.parametrize("kind", KINDS)
def test_hessians_over_inputs_and_weights_are_torchs(kind):
    results = []
    for module in twins(kind, 3, 3 if kind == "lstm_proj" else 2):
        weights, input = weights_of(module), input_of(kind)
        loss = loss_of(module)
        bias = {name: value for name, value in weights.items() if "bias_ih" in name}
        by_bias = hessian(lambda b, w=weights, f=loss, x=input: f({**w, **b}, x))(bias)
        results.append(leaves([hessian(loss, argnums=1)(weights, input), by_bias]))
    assert_all_close(results[1], results[0], SECOND)


@pytest.mark.parametrize("kind", KINDS)
def test_vjp_jvp_linearize_and_products_with_hessians_are_torchs(kind):
    results = []
    for module in twins(kind, 3, 4):
        weights, input = weights_of(module), input_of(kind)
        tangent, loss = random(*input.shape, seed=3), loss_of(module)
        call = lambda x, m=module, w=weights: called(m, w, x)[0]  # noqa: E731
        output, pull = vjp(call, input)
        _, push = linearize(call, input)
        (direction,) = pull(torch.ones_like(output))
        slope = grad(loss, argnums=1)
        product = jvp(lambda x, f=slope, w=weights: f(w, x), (input,), (tangent,))[1]
        older = hvp(lambda x, f=loss, w=weights: f(w, x), input, tangent)[1]
        results.append([output, direction, push(tangent), product, older, jacobian(call, input)])
    assert_all_close(results[1], results[0], SECOND)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_vmap_is_a_loop_over_inputs_states_and_models(kind, options):
    theirs, ours = twins(kind, 3, 4, **options)
    others = [twins(kind, 3, 4, **options) for _ in range(3)]
    inputs = random(4, 3, 2, 3)  # mapped over dimension 1, so (4, 2, 3) each
    hx = random_state(ours, 2)
    states = leaves(hx)
    stacked, _ = stack_module_state([ours for _, ours in others])

    def call(module, input, *states):
        return flat_outputs(module, module(input, states if len(states) > 1 else states[0]))

    def both(weights, input):
        return called(ours, weights, input, hx)[0]

    expected = [call(theirs, inputs[:, n], *states) for n in range(3)]
    actual = vmap(lambda x: call(ours, x, *states), in_dims=1)(inputs)
    for name, value in actual.items():
        assert_close(value, torch.stack([one[name] for one in expected]), name)
    many = [torch.stack([state, 2 * state, -state]) for state in states]
    expected = [call(theirs, inputs[:, 0], *(m[n] for m in many))["output"] for n in range(3)]
    by_state = vmap(lambda *s: call(ours, inputs[:, 0], *s)["output"])(*many)
    assert_close(by_state, torch.stack(expected))
    expected = [
        call(module, inputs[:, n], *states)["output"] for n, (module, _) in enumerate(others)
    ]
    assert_close(vmap(both, in_dims=(0, 1))(stacked, inputs), torch.stack(expected))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_gradients_of_an_ensemble_are_those_of_its_models(kind):
    pairs = [twins(kind, 3, 4) for _ in range(3)]
    stacked, _ = stack_module_state([ours for _, ours in pairs])
    actual = vmap(grad(loss_of(pairs[0][1])), in_dims=(0, None))(stacked, input_of(kind))
    for number, (theirs, _) in enumerate(pairs):
        expected = grad(loss_of(theirs))(weights_of(theirs), input_of(kind))
        for name, value in expected.items():
            assert_close(actual[name][number], value, name)


def test_dropout_under_vmap_asks_for_a_randomness_as_torch_does():
    _, ours = twins("gru", 3, 4, 2, dropout=0.5)
    inputs = random(3, 4, 2, 3)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: first(ours, x))(inputs)
    same = vmap(lambda x: first(ours, x), randomness="same")(inputs[:1].expand(3, -1, -1, -1))
    assert_close(same[1], same[0])
    other = vmap(lambda x: first(ours, x), randomness="different")(inputs[:1].expand(3, -1, -1, -1))
    assert not torch.equal(other[1], other[0])


# --- Autocast and scaled losses.


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_off_inside_and_without_its_cache_are_torchs(kind):
    results = []
    for module in twins(kind, 3, 4, dtype=torch.float32):
        input = input_of(kind, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                inside = first(module, input)
            outside = first(module, input)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            results.append([inside, outside, first(module, input)])
    assert results[1][0].dtype == torch.float32
    assert_all_close(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_a_gradient_scaler_takes_torchs_steps(backend, kind):
    """The second loss overflows: its step is skipped and the scale halved."""
    results = []
    for module in twins(kind, 3, 4, dtype=torch.float32):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scales = []
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            loss = (first(module, input_of(kind, torch.float32)) * factor).square().sum()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales == [64.0, 32.0, 32.0]
        results.append([p.detach() for p in module.parameters()])
    assert_all_close(results[1], results[0])


# --- Backward by other ways.


@pytest.mark.parametrize("reentrant", [False, True], ids=["by_hooks", "reentrant"])
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_checkpointed_stack_with_dropout_has_torchs_gradients(backend, kind, form, reentrant):
    results = []
    for module in twins(kind, 3, 4, 2, dropout=0.5):

        def call(input, module=module):
            given = pack_padded_sequence(input, [4, 2]) if form == "packed" else input
            return next(iter(flat_outputs(module, module(given)).values()))

        torch.manual_seed(5)
        input = input_of(kind).requires_grad_()
        output = checkpoint(call, input, use_reentrant=reentrant)
        output.square().sum().backward()
        results.append([output, input.grad, *(p.grad for p in module.parameters())])
    assert_all_close(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_may_be_offloaded_and_must_not_be_hooked_where_that_is_off(backend, kind):
    theirs, ours = twins(kind, 3, 4)
    expected = torch.autograd.grad(first(theirs, input_of(kind)).sum(), list(theirs.parameters()))
    with torch.autograd.graph.save_on_cpu():
        output = first(ours, input_of(kind))
    assert_all_close(torch.autograd.grad(output.sum(), list(ours.parameters())), expected)
    with (
        torch.autograd.graph.disable_saved_tensors_hooks("not here"),
        pytest.raises(RuntimeError, match="not here"),
        torch.autograd.graph.save_on_cpu(),
    ):
        first(ours, input_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_anomaly_mode_names_a_gradient_that_is_not_a_number(backend, kind):
    texts = []
    for module in twins(kind, 3, 4):
        with quietly(), torch.autograd.detect_anomaly():
            loss = (first(module, input_of(kind)) * float("nan")).sum()
            with pytest.raises(RuntimeError, match="returned nan values") as error:
                loss.backward()
        texts.append(str(error.value).split("'")[0])
    assert texts[0] == texts[1] == "Function "


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_the_graph_see_every_gradient_once(backend, kind):
    seen = []
    for module in twins(kind, 3, 4):
        gathered = []
        weights = list(module.parameters())
        torch.autograd.graph.register_multi_grad_hook(
            weights, lambda grads, gathered=gathered: gathered.extend(grads)
        )
        output = first(module, input_of(kind))
        output.grad_fn.register_prehook(lambda grads, g=gathered: g.append(grads[0]))
        with torch.autograd.set_multithreading_enabled(False):
            output.square().sum().backward()
        seen.append(gathered)
    assert len(seen[1]) == 1 + len(list(twins(kind, 3, 4)[1].parameters()))
    assert_all_close(seen[1], seen[0])


@pytest.mark.parametrize("kind", KINDS)
def test_memory_filled_with_nan_and_inference_mode_change_nothing(backend, kind):
    _, ours = twins(kind, 3, 4)
    expected = first(ours, input_of(kind)).detach()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        filled = first(ours, input_of(kind)).detach()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(filled, expected)
    with torch.inference_mode():
        inferred = first(ours, input_of(kind))
    assert inferred.is_inference()
    assert_close(inferred.clone(), expected)


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_eval_mode_has_first_and_second_derivatives(backend, kind, form):
    results = []
    for module in twins(kind, 3, 4, 2, dropout=0.5):
        module.eval()
        input = input_of(kind).requires_grad_()
        given = pack_padded_sequence(input, [4, 2]) if form == "packed" else input
        output = next(iter(flat_outputs(module, module(given)).values()))
        (slope,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
        second = torch.autograd.grad(
            slope.square().sum(), list(module.parameters()), allow_unused=True
        )
        results.append([slope.detach(), *(g for g in second if g is not None and g.any())])
    assert_all_close(results[1], results[0], SECOND)


def test_a_module_built_by_a_factory_of_another_dtype_runs_in_it(backend):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        theirs, ours = torch.nn.GRU(3, 4), triton_rnn.GRU(3, 4)
    finally:
        torch.set_default_dtype(before)
    ours.load_state_dict(theirs.state_dict())
    assert_close(run(ours, random(4, 2, 3))["output"], run(theirs, random(4, 2, 3))["output"])
