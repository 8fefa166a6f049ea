"""What torch does to a module's call: torch.func, autocast, scaling, checkpoints, graph hooks."""

import contextlib
import warnings

import pytest
import torch
from tolerances import (
    TOLERANCES,
    assert_close,
    assert_same_bits,
    flat_outputs,
    random,
    random_state,
    run,
    twins,
)
from torch.autograd import forward_ad
from torch.autograd import functional as older
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
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
        second = older.hvp(lambda x, f=loss, w=weights: f(w, x), input, tangent)[1]
        jacobian = older.jacobian(call, input)
        results.append([output, direction, push(tangent), product, second, jacobian])
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


def test_zoneout_under_vmap_is_drawn_as_dropout_is():
    ours = triton_rnn.GRU(3, 4, zoneout=0.5, dtype=torch.float64)
    inputs = random(1, 4, 2, 3).expand(3, -1, -1, -1)
    for randomness, is_same in (("same", True), ("different", False)):
        found = vmap(lambda x: ours(x)[0], randomness=randomness)(inputs)
        assert torch.equal(found[1], found[0]) == is_same


# --- Autocast and scaled losses.


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_off_inside_and_without_its_cache_are_torchs(kind):
    results = []
    for module in twins(kind, 3, 4, dtype=torch.float32):
        input = input_of(kind, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                inside = first(module, input)
            outside = outcome(lambda m=module, x=input: first(m, x))
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            uncached = outcome(lambda m=module, x=input: first(m, x))
        results.append([inside, outside, uncached])
    assert results[1][0].dtype == torch.float32
    assert_close(results[1][0], results[0][0])
    for actual, expected in zip(results[1][1:], results[0][1:], strict=True):
        assert_same_outcome(actual, expected, TOLERANCES[torch.bfloat16])


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


# --- Every transform of torch.func and torch.autograd.functional, alone and one in another. Where
# torch.nn refuses one, ours refuses it with the same error, except for vmap, which ours has.


def outcome(call):
    """The tensors of what a call returns, or the type and the text of its error."""
    try:
        return leaves(call())
    except Exception as error:
        return type(error), str(error)


def assert_same_outcome(actual, expected, tolerance):
    """Of `outcome`: close numbers, or the same error, such as where a processor lacks a dtype."""
    if isinstance(expected, tuple):
        assert actual == expected
    else:
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, tolerance=tolerance)


def output_by_input(module):
    weights = weights_of(module)
    return lambda *args: called(module, weights, *args)


def loss_by_input(module):
    weights, loss = weights_of(module), loss_of(module)
    return lambda input: loss(weights, input)


def by_weights(module, input):
    return lambda weights: called(module, weights, input)


def first_by_input(module):
    call = output_by_input(module)
    return lambda input: call(input)[0]


def dual(module, input, tangent):
    """Dual numbers for the input and, at once, for every weight."""
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        weights = {
            name: forward_ad.make_dual(value, torch.ones_like(value))
            for name, value in weights_of(module).items()
        }
        outputs = called(module, weights, forward_ad.make_dual(input, tangent))
        return [part for out in outputs for part in forward_ad.unpack_dual(out)]


# Of the module, an input and a tangent of the input's shape.
TRANSFORMS = {
    "grad_by_weights": lambda m, x, t: grad(loss_of(m))(weights_of(m), x),
    "jacrev": lambda m, x, t: jacrev(output_by_input(m))(x),
    "jacrev_in_chunks": lambda m, x, t: jacrev(output_by_input(m), chunk_size=1)(x),
    "jacrev_by_weights": lambda m, x, t: jacrev(by_weights(m, x))(weights_of(m)),
    "jacfwd": lambda m, x, t: jacfwd(output_by_input(m))(x),
    "jacfwd_by_weights": lambda m, x, t: jacfwd(by_weights(m, x))(weights_of(m)),
    "jacrev_of_jacrev": lambda m, x, t: jacrev(jacrev(loss_by_input(m)))(x),
    "jacfwd_of_jacfwd": lambda m, x, t: jacfwd(jacfwd(loss_by_input(m)))(x),
    "jacrev_of_jacfwd": lambda m, x, t: jacrev(jacfwd(loss_by_input(m)))(x),
    "vjp_by_weights": lambda m, x, t: vjp(by_weights(m, x), weights_of(m))[1](
        [torch.ones_like(out) for out in called(m, weights_of(m), x)]
    ),
    "jvp_by_weights": lambda m, x, t: jvp(by_weights(m, x), (weights_of(m),), (weights_of(m),)),
    "jvp_of_jvp": lambda m, x, t: jvp(lambda y: jvp(first_by_input(m), (y,), (t,))[1], (x,), (t,)),
    "many_jvps": lambda m, x, t: vmap(lambda u: jvp(first_by_input(m), (x,), (u,))[1])(
        torch.stack([t, 2 * t])
    ),
    "many_vjps": lambda m, x, t: vmap(vjp(first_by_input(m), x)[1])(
        torch.stack([torch.ones_like(first(m, x)), torch.zeros_like(first(m, x))])
    ),
    "grad_of_grad": lambda m, x, t: grad(lambda y: (grad(loss_by_input(m))(y) * t).sum())(x),
    "vjp_of_grad": lambda m, x, t: vjp(grad(loss_by_input(m)), x)[1](t),
    "dual_numbers": dual,
    "functionalize": lambda m, x, t: functionalize(output_by_input(m))(x),
    "make_fx": lambda m, x, t: make_fx(output_by_input(m))(t)(x),
    "older_jacobian": lambda m, x, t: older.jacobian(first_by_input(m), x),
    "older_jacobian_vectorized": lambda m, x, t: older.jacobian(
        first_by_input(m), x, vectorize=True
    ),
    "older_jacobian_forward": lambda m, x, t: older.jacobian(
        first_by_input(m), x, vectorize=True, strategy="forward-mode"
    ),
    "older_hessian": lambda m, x, t: older.hessian(loss_by_input(m), x),
    "older_hessian_vectorized": lambda m, x, t: older.hessian(loss_by_input(m), x, vectorize=True),
    "older_hessian_forward": lambda m, x, t: older.hessian(
        loss_by_input(m), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "older_vhp": lambda m, x, t: older.vhp(loss_by_input(m), x, t),
    "older_hvp": lambda m, x, t: older.hvp(loss_by_input(m), x, t),
    "older_vjp": lambda m, x, t: older.vjp(first_by_input(m), x, torch.ones_like(first(m, x))),
    "older_jvp": lambda m, x, t: older.jvp(first_by_input(m), x, t),
}
TRANSFORMED = [
    *((kind, {}) for kind in KINDS),
    *((kind, {"num_layers": 2, "bidirectional": True}) for kind in ("rnn_tanh", "lstm_proj")),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("kind", "options"), TRANSFORMED, ids=str)
def test_a_transform_gives_torchs_numbers_or_torchs_error(kind, options, transform):
    input = random(*(() if kind in CELLS else (3,)), 2, 2)
    tangent = random(*input.shape, seed=3)
    theirs, ours = (
        outcome(lambda m=module: TRANSFORMS[transform](m, input, tangent))
        for module in twins(kind, 2, 3, **options)
    )
    if isinstance(theirs, tuple):
        assert ours == theirs
    else:
        assert isinstance(ours, list), f"torch.nn has this transform, ours says {ours}"
        assert_all_close(ours, theirs, SECOND)


def test_most_of_the_transforms_work():
    """Else the test above would compare errors instead of numbers."""
    input = random(3, 2, 2)
    module = twins("gru", 2, 3)[0]
    refused = [
        name
        for name, transform in TRANSFORMS.items()
        if isinstance(outcome(lambda t=transform: t(module, input, input)), tuple)
    ]
    assert refused == ["older_jacobian_forward", "older_hessian_forward"]


@pytest.mark.parametrize(
    "transform", [grad, hessian, jacrev, jacfwd, vmap], ids=lambda t: t.__name__
)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_packed_batch_in_a_transform_is_refused_as_torch_refuses_it(kind, transform):
    """torch's kernels read the lengths from memory, which a transform's tensors do not have."""
    kinds = []
    for module in twins(kind, 3, 4):

        def loss(input, module=module):
            packed = pack_padded_sequence(input, torch.tensor([2, 4]), enforce_sorted=False)
            return module(packed)[0].data.square().sum()

        kinds.append(outcome(lambda f=loss: transform(f)(random(4, 2, 3)))[0])
    assert kinds[0] is kinds[1]
    assert kinds[0] in (RuntimeError, NotImplementedError)


def stacked_states(module, count):
    """`count` states, each of their tensors stacked."""
    states = [leaves(random_state(module, 2, seed=n)) for n in range(count)]
    return [torch.stack(parts) for parts in zip(*states, strict=True)]


def with_states(module, weights, input, states):
    return called(module, weights, input, tuple(states) if len(states) > 1 else states[0])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_models_inputs_and_states_at_once_is_a_loop_over_them(kind, options):
    options = {} if kind in CELLS else options
    pairs = [twins(kind, 3, 4, **options) for _ in range(3)]
    ours = pairs[0][1]
    stacked, _ = stack_module_state([ours for _, ours in pairs])
    inputs, states = random(3, *input_of(kind).shape), stacked_states(ours, 3)

    actual = vmap(lambda w, x, *s: with_states(ours, w, x, s))(stacked, inputs, *states)
    expected = [
        with_states(theirs, weights_of(theirs), inputs[n], [state[n] for state in states])
        for n, (theirs, _) in enumerate(pairs)
    ]
    for many, *each in zip(actual, *expected, strict=True):
        assert_close(many, torch.stack(each))

    # Mapped over another dimension of each, results put elsewhere, and one vmap in another.
    moved = [state.movedim(0, 1) for state in states]
    again = vmap(lambda x, *s: with_states(ours, weights_of(ours), x, s), 1, 1)(
        inputs.movedim(0, 1), *moved
    )
    nested = vmap(vmap(output_by_input(ours)), in_dims=1)(inputs[None].movedim(0, 1))
    for n, value in enumerate(again):
        one = with_states(pairs[0][0], weights_of(ours), inputs[2], [s[2] for s in states])[n]
        assert_close(value.select(1, 2), one)
    for many, one in zip(nested, called(pairs[0][0], weights_of(ours), inputs[1]), strict=True):
        assert_close(many[0, 1], one)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_per_sample_of_an_ensemble_are_a_loop_over_both(kind):
    pairs = [twins(kind, 3, 4) for _ in range(2)]
    stacked, _ = stack_module_state([ours for _, ours in pairs])
    inputs = random(3, *input_of(kind).shape)
    per_sample = vmap(grad(loss_of(pairs[0][1])), in_dims=(None, 0))
    actual = vmap(per_sample, in_dims=(0, None))(stacked, inputs)
    for number, (theirs, _) in enumerate(pairs):
        for sample, input in enumerate(inputs):
            expected = grad(loss_of(theirs))(weights_of(theirs), input)
            for name, value in expected.items():
                assert_close(actual[name][number, sample], value, name)


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_in_a_transform_draws_torchs_numbers(kind):
    """Of vmap too, where every element is given one mask; torch.nn has no vmap to compare with."""
    results = []
    for module in twins(kind, 3, 4, 2, dropout=0.5):
        for transform in (lambda f: grad(lambda x: f(x).sum()), jacrev):
            torch.manual_seed(7)
            results.append(transform(first_by_input(module))(input_of(kind)))
        torch.manual_seed(7)
        results.append(jvp(first_by_input(module), (input_of(kind),), (input_of(kind),))[1])
    assert_all_close(results[3:], results[:3])

    theirs, ours = twins(kind, 3, 4, 2, dropout=0.5)
    inputs = random(3, *input_of(kind).shape)
    torch.manual_seed(7)
    same = vmap(first_by_input(ours), randomness="same")(inputs)
    for input, value in zip(inputs, same, strict=True):
        torch.manual_seed(7)
        assert_close(value, first(theirs, input))
    with pytest.raises(RuntimeError, match="called random operation while in randomness error"):
        vmap(first_by_input(ours))(inputs)
    assert_close(vmap(first_by_input(ours.eval()))(inputs)[2], first(theirs.eval(), inputs[2]))


# --- More of autocast and of scaled losses.


AUTOCAST_FORMS = [
    (kind, form) for kind in KINDS for form in ("padded", "packed", "hx") if kind in LAYERS
] + [(kind, form) for kind in CELLS for form in ("padded", "hx")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "form"), AUTOCAST_FORMS)
def test_autocast_to_float16_gives_torchs_numbers_or_torchs_error(kind, form, dtype):
    """An error where the processor has no float16 instructions: of oneDNN, in torch.nn's LSTM."""
    results = []
    for module in twins(kind, 3, 4, dtype=dtype):
        input = input_of(kind, dtype)
        given = [pack_padded_sequence(input, [4, 2]) if form == "packed" else input]
        if form == "hx":
            given.append(random_state(module, 2))

        def forward_and_backward(module=module, given=given):
            with torch.autocast("cpu", dtype=torch.float16):
                outputs = list(flat_outputs(module, module(*given)).values())
            sum(out.float().square().sum() for out in outputs).backward()
            return [*outputs, *(p.grad for p in module.parameters())]

        results.append(outcome(forward_and_backward))
    assert_same_outcome(results[1], results[0], TOLERANCES[torch.float16])


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_mixed_precision_training_takes_torchs_steps(kind, form):
    """Forward under autocast, backward outside of it, the second step skipped for its infinity."""

    def trained(module):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        history = []
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            input = input_of(kind, torch.float32)
            given = pack_padded_sequence(input, [4, 2]) if form == "packed" else input
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = next(iter(flat_outputs(module, module(given)).values()))
            scaler.scale(output.float().square().mean() * factor).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            history.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        assert torch.equal(history[1], history[0])
        assert not torch.equal(history[2], history[1])
        return history

    theirs, ours = twins(kind, 3, 4, 2, dtype=torch.float32)
    expected = outcome(lambda: trained(theirs))
    # Both are torch.nn's kernels here: Adam divides by gradients that bfloat16 has rounded.
    assert_same_outcome(outcome(lambda: trained(ours)), expected, 1e-3)


# --- More of the ways through a graph.


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_memory_filled_with_nan_changes_no_gradient(backend, kind, form):
    """What torch.empty returns is filled with NaN then: whatever is read must have been written."""
    _, ours = twins(kind, 3, 4, 2, bidirectional=True)
    hx = random_state(ours, 2)

    def prepare(input):
        if form == "padded":
            return input
        return pack_padded_sequence(input, torch.tensor([2, 4]), enforce_sorted=False)

    expected = run(ours, input_of(kind), hx, prepare=prepare)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        actual = run(ours, input_of(kind), hx, prepare=prepare)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_packed_layer_offloads_what_it_saves_and_is_differentiated_twice(backend, kind):
    results = []
    for module in twins(kind, 3, 4, 2, bidirectional=True):
        input = input_of(kind).requires_grad_()
        given = pack_padded_sequence(input, torch.tensor([2, 4]), enforce_sorted=False)
        with torch.autograd.graph.save_on_cpu():
            loss = module(given)[0].data.square().sum()
            (slope,) = torch.autograd.grad(loss, input, create_graph=True)
            second = torch.autograd.grad(slope.square().sum(), [input, *module.parameters()])
        results.append([slope, *second])
    assert_all_close(results[1], results[0], SECOND)


@pytest.mark.parametrize("preserve", [True, False], ids=["random_state_kept", "not_kept"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["by_hooks", "reentrant"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_checkpoint_with_and_without_the_random_state_is_torchs(
    backend, kind, reentrant, preserve
):
    """Without it the recomputation draws another mask, the same one in ours as in torch.nn's."""
    results = []
    for module in twins(kind, 3, 4, 2, dropout=0.5):
        torch.manual_seed(5)
        input = input_of(kind).requires_grad_()
        hx = random_state(module, 2)
        output = checkpoint(
            lambda x, m=module, h=hx: first(m, x, h),
            input,
            use_reentrant=reentrant,
            preserve_rng_state=preserve,
        )
        output.square().sum().backward()
        results.append([output, input.grad, *(p.grad for p in module.parameters())])
    assert_all_close(results[1], results[0])


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_anomaly_mode_names_a_nan_that_a_weight_brings_in(backend, kind, form):
    """A loss that is a number, and a gradient that is not: c * inf * 0 inside the layer."""
    texts = []
    for module in twins(kind, 3, 4, 2):
        input = input_of(kind)
        given = pack_padded_sequence(input, [4, 2]) if form == "packed" else input
        with quietly(), torch.autograd.detect_anomaly():
            output = next(iter(flat_outputs(module, module(given)).values()))
            # Its derivative at 0 is 0 * inf, a NaN that reaches the layer as its grad_output.
            loss = torch.where(output.isnan(), output, (output - output.detach()).sqrt() * 0).sum()
            texts.append(outcome(loss.backward))
    assert [kind for kind, _ in texts] == [RuntimeError] * 2
    assert all("returned nan values" in text for _, text in texts)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_modules_and_nodes_see_and_change_torchs_gradients(backend, kind):
    results = []
    for module in twins(kind, 3, 4):
        seen = []
        module.register_full_backward_pre_hook(
            lambda m, grads: tuple(g if g is None else 2 * g for g in grads)
        )
        module.register_full_backward_hook(
            lambda m, into, out, seen=seen: seen.extend([*into, *out])
        )
        input = input_of(kind).requires_grad_()
        output = first(module, input * 1)
        node = output.grad_fn
        node.register_hook(lambda into, out, seen=seen: seen.append(out[0]))
        torch.autograd.graph.register_multi_grad_hook(
            [input, *module.parameters()],
            lambda grad, seen=seen: seen.append(grad.new_ones(1)),
            mode="any",
        )
        assert torch.autograd.graph.get_gradient_edge(output).node is node
        output.square().sum().backward()
        results.append([*seen, input.grad, *(p.grad for p in module.parameters())])
    expected, actual = ([g for g in found if g is not None] for found in results)
    assert_all_close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_respect_to_an_edge_of_the_graph_are_torchs(backend, kind):
    results = []
    for module in twins(kind, 3, 4):
        input = (input_of(kind).requires_grad_() * 1).clone()
        edge = torch.autograd.graph.get_gradient_edge(input)
        output = first(module, input)
        results.append(torch.autograd.grad([output.sum()], [edge]))
    assert_all_close(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_inference_tensors_are_taken_and_refused_as_torch_does(backend, kind):
    """They may be read, but not saved for a backward."""
    results = []
    for module in twins(kind, 3, 4):
        with torch.inference_mode():
            input = input_of(kind) * 2
            state = leaves(random_state(module, 2))
        hx = state if len(state) > 1 else state[0]
        with torch.no_grad():
            results.append(outcome(lambda m=module, x=input, h=hx: first(m, x, h)))
        results.append(outcome(lambda m=module, x=input, h=hx: first(m, x, h)))
    assert_all_close(results[2], results[0])
    assert results[1][0] is results[3][0] is RuntimeError
    assert "Inference tensors cannot be saved for backward" in results[1][1]
    assert "Inference tensors cannot be saved for backward" in results[3][1]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_may_be_changed_where_autograd_is_told_to_keep_copies(kind):
    """A dispatch mode, under which only torch.nn's own forward runs."""
    results = []
    for module in twins(kind, 3, 4):
        expected = run(module, input_of(kind))["grad of input"]
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            input = input_of(kind).requires_grad_()
            given = input.clone()
            outputs = flat_outputs(module, module(given))
            with torch.no_grad():
                given.zero_()
            chosen = [outputs[name] for name in sorted(outputs)]
            grads = [random(*out.shape, seed=10 + n) for n, out in enumerate(chosen)]
            torch.autograd.backward(chosen, grads)
        results.append([expected, input.grad])
    assert_all_close(results[1], results[0])
    assert_close(results[1][1], results[1][0])


@pytest.mark.parametrize("kind", LAYERS)
def test_a_backward_of_an_eager_call_can_be_transformed(kind):
    """vjp and jvp of the gradient by the gradient of the output; it is linear in that."""
    _, ours = twins(kind, 3, 4, 2, bidirectional=True)
    input = random(5, 2, 3).requires_grad_()
    output, _ = ours(input, random_state(ours, 2))
    wanted = [input, *ours.parameters()]

    def back(grad):
        return torch.autograd.grad(output, wanted, grad, retain_graph=True)

    grad, tangent = random(*output.shape, seed=7), random(*output.shape, seed=8)
    values, tangents = jvp(back, (grad,), (tangent,))
    for actual, expected in zip((*values, *tangents), (*back(grad), *back(tangent)), strict=True):
        assert_close(actual, expected, tolerance=SECOND)
    values, pullback = vjp(
        lambda v: torch.autograd.grad(output, wanted, v, create_graph=True), grad
    )
    weights = [random(*value.shape, seed=9 + i) for i, value in enumerate(values)]
    (found,) = pullback(tuple(weights))
    expected = sum((w * value).sum() for w, value in zip(weights, back(tangent), strict=True))
    assert_close((found * tangent).sum(), expected, tolerance=SECOND)
    batch = torch.stack((grad, tangent))
    many, slopes = jvp(vmap(back), (batch,), (batch.flip(0),))
    for number, given in enumerate((grad, tangent)):
        for actual, slope, expected, across in zip(
            many, slopes, back(given), back(batch[1 - number]), strict=True
        ):
            assert_close(actual[number], expected, tolerance=SECOND)
            assert_close(slope[number], across, tolerance=SECOND)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_backward_of_an_eager_call_hands_tangents_on(kind):
    _, ours = twins(kind, 3, 4)
    input = random(5, 2, 3).requires_grad_()
    output, _ = ours(input)
    grad, tangent = random(*output.shape, seed=7), random(*output.shape, seed=8)
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(
            output, input, forward_ad.make_dual(grad, tangent), retain_graph=True
        )
        value, slope = forward_ad.unpack_dual(found)
    for actual, given in ((value, grad), (slope, tangent)):
        (expected,) = torch.autograd.grad(output, input, given, retain_graph=True)
        assert_close(actual, expected, tolerance=SECOND)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_ahead_of_autograd_has_torchs_operators(kind, training):
    theirs, ours = twins(kind, 3, 4)
    input = random(2, 3) if kind in CELLS else random(6, 2, 3)
    ours.requires_grad_(training)

    def first(module):
        def call(x):
            result = module(x)
            return result[0] if isinstance(result, tuple) else result

        return call

    traced = make_fx(first(ours), pre_dispatch=True)(input)
    other = random(*input.shape, seed=5)
    assert_close(traced(other), first(theirs)(other), tolerance=SECOND)


@pytest.mark.parametrize("options", [{"layer_norm": True}, {"clip_hidden": 0.2}])
def test_a_trace_ahead_of_autograd_of_what_torch_does_not_have_is_right(options):
    module = triton_rnn.GRU(3, 4, **options).double()
    traced = make_fx(lambda x: module(x)[0], pre_dispatch=True)(random(6, 2, 3))
    other = random(6, 2, 3, seed=5)
    assert_close(traced(other), module(other)[0], tolerance=SECOND)
