"""Several GPUs: everything is launched on the tensors' device and its stream, whichever is current.

With a driver that starts nothing, and tensors that torch only believes to be on a GPU.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton", reason="the kernels need triton, which is for Linux alone")

from triton.runtime import driver  # noqa: E402

from bench.no_device import no_device  # noqa: E402
from triton_rnn import cells  # noqa: E402
from triton_rnn.backends import triton as backend  # noqa: E402
from triton_rnn.backends.triton import launch, layer  # noqa: E402
from triton_rnn.request import Request  # noqa: E402

STEPS, BATCH, INPUT, HIDDEN = 5, 3, 16, 32
BATCH_SIZES = [3, 3, 2, 1, 1]


class Stream:
    """`waited` are the events that it waits for."""

    def __init__(self):
        self.waited = []

    def synchronize(self):
        """Nothing runs."""

    def wait_event(self, event):
        self.waited.append(event)


class Event:
    def record(self, stream):
        self.stream = stream


class Gpus:
    """Two of them. `launches` has of each launch the device that was current, stream, arguments."""

    def __init__(self):
        self.current = 0
        self.launches = []
        self.streams = [Stream(), Stream()]
        # Which tensors are used on a stream that they were not made on.
        self.recorded = []

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before

    def tell(self, kernel, place, arguments, metadata, hooks):
        self.launches.append((self.current, place[3], arguments, metadata))


def pointer(tensor):
    return 16 * (1 + tensor.device.index) if tensor.device.type == "cuda" else 16


def part(tensor, places):
    """What `tensor[places]` is: without CUDA in torch's build, indexing asks for a GPU."""
    dim = 0
    for place in places if isinstance(places, tuple) else (places,):
        if isinstance(place, slice):
            first, end, step = place.indices(tensor.size(dim))
            assert step == 1
            tensor, dim = tensor.narrow(dim, first, max(0, end - first)), dim + 1
        elif isinstance(place, torch.Tensor):
            tensor, dim = tensor.index_select(dim, place), dim + 1
        else:
            tensor = tensor.select(dim, place)
    return tensor


def put(tensor, places, numbers):
    """`tensor[places] = numbers`, likewise."""
    if not isinstance(places, torch.Tensor):
        part(tensor, places).copy_(numbers)
    elif isinstance(numbers, torch.Tensor):
        tensor.index_copy_(0, places, numbers)
    else:
        tensor.index_fill_(0, places, numbers)


@pytest.fixture
def gpus(monkeypatch):
    found = Gpus()
    with no_device(tell=found.tell):
        # Triton asks for the current device's; the launcher for that of a number.
        monkeypatch.setattr(
            driver._active,
            "get_current_stream",
            lambda device: 100 + (found.current if device > 1 else device),
        )
        for place, name, value in (
            (torch.cuda, "current_device", lambda: found.current),
            (torch.cuda, "device", found.device),
            (torch.cuda, "current_stream", lambda device: found.streams[device.index]),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "Event", Event),
            (torch.Tensor, "pin_memory", lambda tensor: tensor),
            (torch.Tensor, "record_stream", lambda *asked: found.recorded.append(asked)),
            (torch.Tensor, "data_ptr", pointer),
            (torch.Tensor, "__getitem__", part),
            (torch.Tensor, "__setitem__", put),
            (launch, "raise_failed_wait", lambda device: None),
            (launch, "_error_words", lambda device: torch.zeros(2, dtype=torch.int64)),
        ):
            monkeypatch.setattr(place, name, value)
        with FakeTensorMode():
            yield found
    # Tensors that are on no GPU must not be met again.
    launch.nothing.cache_clear()
    launch._zeros.clear()
    launch._packing.cache_clear()


def run(cell, device, given, packed=False, directions=2):
    """A layer on a device, forward and backward."""
    request = Request(
        cell,
        device,
        torch.float16,
        seq_len=STEPS,
        batch=BATCH,
        input_size=INPUT,
        hidden_size=HIDDEN,
        output_size=HIDDEN,
        directions=directions,
        biased=True,
        packed=packed,
        needs_grad=True,
    )

    def empty(*shape):
        return torch.empty(shape, dtype=request.dtype, device=device)

    rows = cell.gates * HIDDEN
    weights = [empty(rows, INPUT), empty(rows, HIDDEN), empty(rows), empty(rows)] * directions
    batch_sizes = BATCH_SIZES if packed else []
    input = empty(sum(batch_sizes), INPUT) if packed else empty(STEPS, BATCH, INPUT)
    state = empty(directions, BATCH, HIDDEN) if given else None
    c_0 = state if cell.states == 2 else None
    results, saved = backend.forward(request, input, batch_sizes, state, c_0, weights)
    grads = [results[0].flatten(0, -2), *(None for _ in results[1:])]
    needs = [True, given, given and cell.states == 2] + [True] * len(weights)
    found = backend.backward(request, input, batch_sizes, state, c_0, weights, saved, grads, needs)
    return [*results, *(tensor for tensor in found if tensor is not None)]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("name", ["rnn_tanh", "gru", "lstm"])
def test_all_is_launched_where_the_tensors_are(gpus, name, given, packed):
    for current, index in ((0, 1), (1, 0), (0, 0), (1, 1), (0, 1)):
        gpus.current = current
        results = run(cells.CELLS[name], torch.device("cuda", index), given, packed)
        assert {tensor.device.index for tensor in results} == {index}
        assert gpus.current == current, "given back"
        assert len(gpus.launches) >= 3, "projection, forward, backward"
        for place, stream, arguments, _ in gpus.launches:
            assert (place, stream) == (index, 100 + index)
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            # Of pinned memory is only the word for errors.
            assert {t.device.index for t in tensors if t.device.type == "cuda"} <= {index}
            assert tensors or pointer(results[0]) in arguments
        gpus.launches.clear()


def test_what_was_compiled_for_one_gpu_is_not_started_on_another(gpus):
    def went_tritons_way():
        found = [metadata is not None for *_, metadata in gpus.launches]
        gpus.launches.clear()
        return found

    for index in (0, 1):
        run(cells.CELLS["lstm"], torch.device("cuda", index), True)
        assert all(went_tritons_way())
    for index in (0, 1):
        run(cells.CELLS["lstm"], torch.device("cuda", index), True)
        assert not any(went_tritons_way())


def test_a_packing_that_another_stream_reads_is_kept_for_it(gpus):
    device = torch.device("cuda", 1)
    packing = launch.packing_of(BATCH_SIZES, device)
    assert launch.packing_of(BATCH_SIZES, device) is packing
    assert not gpus.streams[1].waited and not gpus.recorded, (
        "its own stream has nothing to wait for"
    )
    gpus.streams[1] = other = Stream()
    assert launch.packing_of(BATCH_SIZES, device) is packing
    assert other.waited == [packing.ready] and packing.ready.stream is packing.stream
    tensors = [packing.batch_sizes, packing.offsets, packing.earlier, packing.last]
    assert [id(tensor) for tensor, _ in gpus.recorded] == [id(tensor) for tensor in tensors]
    assert all(stream is other for _, stream in gpus.recorded)
    assert launch.packing_of(BATCH_SIZES, torch.device("cuda", 0)) is not packing


def test_the_test_would_see_a_launch_on_the_current_gpu(gpus, monkeypatch):
    monkeypatch.setattr(layer, "_on", lambda device: contextlib.nullcontext())
    run(cells.CELLS["gru"], torch.device("cuda", 1), True)
    assert all(place == 0 for place, *_ in gpus.launches)
