"""What happens to a module between calls, during one, and from several sides at once."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tolerances import assert_close, assert_same_results, flat_outputs, random, run, twins
from torch.nn.utils import parametrizations, parametrize, prune

import triton_rnn
from triton_rnn import dispatch
from triton_rnn.profiling import ranges

ROOT = Path(__file__).parent.parent
TIMEOUT = 240
ONE_OF_EACH = ("rnn_tanh", "gru", "lstm", "lstm_proj", "gru_cell", "lstm_cell")
LAYERS = ("rnn_tanh", "gru", "lstm", "lstm_proj")


def input_of(kind):
    return random(2, 3) if kind.endswith("cell") else random(20, 2, 3)


def weight_of(kind):
    return "weight_hh" if kind.endswith("cell") else "weight_hh_l0"


def output_of(module, input):
    return next(iter(flat_outputs(module, module(input)).values()))


def trained(module, kind, steps=3, between=lambda module, step: None):
    """The losses of some steps of training, and the weights after them."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        # A parametrized weight is computed once: torch's layers ask for it four times a call.
        with parametrize.cached():
            loss = output_of(module, input_of(kind)).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        between(module, step)
    return [torch.stack(losses), *(p.detach() for p in module.parameters())]


# --- Between calls.

PREPARATIONS = {
    "spectral_norm": lambda m, name: parametrizations.spectral_norm(m, name),
    "weight_norm": lambda m, name: parametrizations.weight_norm(m, name),
    "orthogonal": lambda m, name: parametrizations.orthogonal(m, name),
    "pruned": lambda m, name: prune.random_unstructured(m, name, amount=0.4),
    "frozen": lambda m, name: getattr(m, name).requires_grad_(False),
}


@pytest.mark.parametrize("preparation", PREPARATIONS)
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_training_with_a_changed_weight_takes_torchs_steps(backend, kind, preparation):
    """Spectral norm moves its own vectors whenever its weight is asked for in training."""
    results = []
    for module in twins(kind, 3, 4):
        torch.manual_seed(7)
        PREPARATIONS[preparation](module, weight_of(kind))
        results.append(trained(module, kind))
    for value, actual in zip(*results, strict=True):
        assert_close(actual, value, tolerance=1e-11)  # three steps, each amplifies the last's


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_pruned_weight_made_permanent_takes_effect(backend, kind):
    results = []
    for module in twins(kind, 3, 4):
        torch.manual_seed(7)
        prune.random_unstructured(module, weight_of(kind), amount=0.4)
        output_of(module, input_of(kind))
        prune.remove(module, weight_of(kind))
        results.append(run(module, input_of(kind)))
    assert_same_results(results[1], results[0])


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_data_edited_between_steps_takes_effect(backend, kind):
    def clip(module, step):
        for parameter in module.parameters():
            parameter.data.clamp_(-0.3, 0.3)
        getattr(module, weight_of(kind)).data = getattr(module, weight_of(kind)).data * 0.5

    results = [trained(module, kind, between=clip) for module in twins(kind, 3, 4)]
    for value, actual in zip(*results, strict=True):
        assert_close(actual, value, tolerance=1e-11)  # as above


@pytest.mark.parametrize("kind", ["gru", "lstm", "gru_cell"])
def test_a_weight_tied_between_two_modules_sums_both_gradients(backend, kind):
    gradients = []
    name = weight_of(kind)
    for pair in zip(twins(kind, 3, 4), twins(kind, 3, 4), strict=True):
        setattr(pair[1], name, getattr(pair[0], name))
        sum(output_of(module, input_of(kind)).square().sum() for module in pair).backward()
        gradients.append([p.grad for module in pair for p in module.parameters()])
    for value, actual in zip(*gradients, strict=True):
        assert_close(actual, value)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_step_of_the_optimizer_between_forward_and_backward_is_detected(backend, kind):
    texts = []
    for module in twins(kind, 3, 4):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        # Of an input that needs a gradient: else nobody would need the weights as they were.
        loss = output_of(module, input_of(kind).requires_grad_()).square().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
            loss.backward()
        texts.append(str(error.value).split(":")[0])
    assert texts[0] == texts[1]


# --- During a call: what is interrupted leaves nothing behind.


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


@contextlib.contextmanager
def stopped_after(monkeypatch, backend, calls, error):
    """The backend does so many layers and then raises."""
    module = dispatch.backend_module(backend)
    original, done = module.forward, []

    def forward(*args):
        done.append(1)
        if len(done) > calls:
            raise error
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", forward)
        yield


@pytest.mark.parametrize("error", [Interrupted(), RuntimeError("no"), MemoryError()], ids=repr)
@pytest.mark.parametrize("backend", ["native", "torchscript"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_call_that_ends_halfway_leaves_the_module_as_it_was(monkeypatch, backend, kind, error):
    _, ours = twins(kind, 3, 4, 3, bidirectional=True)
    with triton_rnn.use_backend(backend):
        expected = run(ours, input_of(kind))
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    attributes = set(vars(ours))
    with (
        stopped_after(monkeypatch, backend, 1, error),
        pytest.raises(type(error)),
        triton_rnn.use_backend(backend),
        triton_rnn.profile(),
    ):
        ours(input_of(kind))
    assert dispatch.requested() == "auto"
    assert not ranges.on()
    assert set(vars(ours)) == attributes
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    with triton_rnn.use_backend(backend):
        assert_same_results(run(ours, input_of(kind)), expected)


INTERRUPTED = """
import signal, sys, torch, triton_rnn
torch.set_num_threads(1)
kind, backend = sys.argv[1:]
module = getattr(triton_rnn, kind)(8, 32, num_layers=2)
small = torch.randn(5, 2, 8)
long = torch.randn(20_000, 1, 8)
with triton_rnn.use_backend(backend):
    expected = module(small)[0].clone()
    interrupts = 0
    for delay in (0.001, 0.004, 0.02, 0.05):
        signal.setitimer(signal.ITIMER_REAL, delay)
        try:
            for _ in range(100_000):
                module(long)[0].sum().backward()
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        module.zero_grad()
    assert interrupts == 4, interrupts
    assert torch.equal(module(small)[0], expected)
    module(small)[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
print("usable")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of a timer are for POSIX systems")
@pytest.mark.parametrize("backend", ["native", "torchscript", "auto"])
def test_a_module_is_usable_after_a_keyboard_interrupt(backend):
    program = (
        "import signal\nsignal.signal(signal.SIGALRM, signal.default_int_handler)\n" + INTERRUPTED
    )
    child = subprocess.run(
        [sys.executable, "-c", program, "GRU", backend],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert child.stdout.strip() == "usable", child.stderr


# --- From several threads and processes.


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("backend", ["native", "torchscript", "reference", "auto"])
@pytest.mark.parametrize("kind", ["gru", "lstm", "gru_cell"])
def test_threads_that_share_a_module_each_have_their_numbers(kind, backend, threads):
    theirs, ours = twins(kind, 3, 4)
    inputs = [random(*input_of(kind).shape, seed=n) for n in range(threads)]
    weights = list(ours.parameters())

    def results(module, input, weights):
        output = output_of(module, input)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), weights)]

    expected = [results(theirs, input, list(theirs.parameters())) for input in inputs]
    found, errors = {}, []
    start = threading.Barrier(threads)

    def work(number):
        try:
            with triton_rnn.use_backend(backend):
                start.wait(timeout=TIMEOUT)
                found[number] = [results(ours, inputs[number], weights) for _ in range(20)]
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=TIMEOUT)
    assert not errors
    assert sorted(found) == list(range(threads))
    for number, rounds in found.items():
        for one in rounds:
            for value, actual in zip(expected[number], one, strict=True):
                assert_close(actual, value)


LOADING = """
import sys, torch, triton_rnn

class Encoded(torch.utils.data.Dataset):
    # Each item is what a module makes of a sequence, in the worker.
    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 8

    def __getitem__(self, index):
        input = torch.full((6, 1, 3), index / 8.0)
        with torch.no_grad():
            return self.module(input)[0]

def main():
    # torch's own products hang in a forked process whose parent had several threads.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = getattr(triton_rnn, sys.argv[2])(3, 4)
    expected = torch.stack([Encoded(module)[n] for n in range(8)])
    loader = torch.utils.data.DataLoader(
        Encoded(module), batch_size=2, num_workers=2, multiprocessing_context=sys.argv[1]
    )
    for _ in range(2):
        batches = []
        for batch in loader:
            batches.append(batch)
            # The parent trains meanwhile.
            module(torch.randn(6, 2, 3))[0].sum().backward()
        assert torch.equal(torch.cat(batches), expected)
    print("same")

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_may_run_a_module(start, tmp_path):
    program = tmp_path / "loading.py"  # a file, for a spawned process imports it
    program.write_text(LOADING)
    children = [
        subprocess.Popen(
            [sys.executable, str(program), start, name],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("GRU", "LSTM")
    ]
    for child in children:
        output, errors = child.communicate(timeout=TIMEOUT)
        assert output.strip() == "same", errors
