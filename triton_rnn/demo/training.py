"""Train one model with torch.nn's recurrent layer and one with triton_rnn's, and time both fairly.

Fair means: in one process, on the same batches, a step of one and then a step of the other, each
going first every second time, after a warm-up on copies that are thrown away. So a machine that
slows down for a while slows both, and the warm-up does not change the run that is compared.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

import triton_rnn
from triton_rnn.demo import distributed
from triton_rnn.demo.settings import DemoError, Settings

THEIRS = "torch.nn"
OURS = "triton_rnn"
NAMES = (THEIRS, OURS)

# TorchScript specialises its code in the first calls; cuDNN and Triton choose and build kernels.
WARMUP_STEPS = 5
MAX_GRADIENT_NORM = 1.0
# float32 losses of a few nats that were summed in another order differ by less than this.
ROUNDING = 1e-5

CELLS: dict[str, tuple[str, dict[str, str]]] = {
    "rnn": ("RNN", {"nonlinearity": "tanh"}),
    "rnn-relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
}

Batch = tuple[Tensor, Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]


class Model(nn.Module):
    """What the two jobs have in common: a model with one recurrent part, ``recurrent``."""

    recurrent: nn.RNNBase


@dataclass(frozen=True)
class Progress:
    """Where one of the two trainings stands after a step. ``seconds`` is the time of that step."""

    name: str
    step: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Both trainings, by name. Losses are one number a step; times are seconds, one a step."""

    models: dict[str, Model]
    same_initial_weights: bool
    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]
    backend: str

    @property
    def largest_loss_difference(self) -> float:
        pairs = zip(self.losses[THEIRS], self.losses[OURS], strict=True)
        return max(abs(theirs - ours) for theirs, ours in pairs)

    @property
    def median_seconds(self) -> dict[str, float]:
        return {name: statistics.median(seconds) for name, seconds in self.seconds.items()}

    @property
    def ratio(self) -> float:
        """How many times faster a median step of ours is."""
        return self.median_seconds[THEIRS] / self.median_seconds[OURS]

    @property
    def speed_text(self) -> str:
        return f"{self.ratio:.2f}x faster" if self.ratio >= 1 else f"{1 / self.ratio:.2f}x slower"

    @property
    def first_step_apart(self) -> int | None:
        """The first step, from 1, whose losses differ by more than the rounding of one step."""
        pairs = zip(self.losses[THEIRS], self.losses[OURS], strict=True)
        apart = (step for step, (a, b) in enumerate(pairs, 1) if abs(a - b) > ROUNDING)
        return next(apart, None)

    @property
    def difference_text(self) -> str:
        return f"{self.largest_loss_difference:.1e}" if self.largest_loss_difference else "0"


def recurrent_layer(library: ModuleType, settings: Settings, input_size: int) -> nn.RNNBase:
    """The batch-first recurrent layer that ``settings`` names, from torch.nn or triton_rnn."""
    class_name, arguments = CELLS[settings.cell]
    layer_class: Callable[..., nn.RNNBase] = getattr(library, class_name)
    return layer_class(
        input_size, settings.hidden, num_layers=settings.layers, batch_first=True, **arguments
    )


def run_pair(
    settings: Settings,
    build: Callable[[ModuleType], Model],
    batch_at: Callable[[int], Batch],
    loss_function: LossFunction,
    on_step: Callable[[Progress], None],
) -> Comparison:
    """Train both models for ``settings.steps`` steps.

    Args:
        settings: length, seed, device and backend of the run.
        build: makes the model with the recurrent layer of the library that it is given.
        batch_at: input and target of a step, counted from 0, on the CPU.
        loss_function: of a model's output and the target.
        on_step: told about each step, outside the time that is measured.

    Raises:
        DemoError: the backend cannot run this model, or a loss stopped being finite.
    """
    models = {
        THEIRS: _build(build, nn, settings),
        OURS: _build(build, triton_rnn, settings),
    }
    weights = [model.state_dict() for model in models.values()]
    same_initial_weights = weights[0].keys() == weights[1].keys() and all(
        torch.equal(weights[0][key], weights[1][key]) for key in weights[0]
    )
    first = distributed.share(batch_at(0))
    loss_function = distributed.shared_loss(loss_function, settings.batch)
    with triton_rnn.use_backend(settings.backend):
        backend = _backend_in_use(models[OURS], settings, first)
        _warm_up(models, settings, first, loss_function)
        losses, seconds = _train(models, settings, batch_at, loss_function, on_step)
    return Comparison(models, same_initial_weights, losses, seconds, backend)


def _build(build: Callable[[ModuleType], Model], library: ModuleType, settings: Settings) -> Model:
    # The caller's random state is none of our business, so it is put back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return build(library).to(settings.device)


def _backend_in_use(model: Model, settings: Settings, batch: Batch) -> str:
    captured: list[Tensor] = []
    hook = model.recurrent.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    try:
        model(batch[0].to(settings.device))
    except triton_rnn.BackendError as error:
        # The backend can run here, but not this cell on this device.
        raise DemoError(f"argument --backend: {error}") from error
    finally:
        hook.remove()
    return str(triton_rnn.explain(model.recurrent, captured[0]).backend)


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=settings.lr)


def _training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, loss_function: LossFunction
) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = loss_function(model(batch[0]), batch[1])
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.detach()


def _warm_up(
    models: dict[str, Model], settings: Settings, batch: Batch, loss_function: LossFunction
) -> None:
    on_device = batch[0].to(settings.device), batch[1].to(settings.device)
    for model in models.values():
        throw_away = distributed.parallel(copy.deepcopy(model))
        optimizer = _optimizer(throw_away, settings)
        for _ in range(WARMUP_STEPS):
            _training_step(throw_away, optimizer, on_device, loss_function)


def _train(
    models: dict[str, Model],
    settings: Settings,
    batch_at: Callable[[int], Batch],
    loss_function: LossFunction,
    on_step: Callable[[Progress], None],
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    trained = {name: distributed.parallel(model) for name, model in models.items()}
    optimizers = {name: _optimizer(model, settings) for name, model in trained.items()}
    losses: dict[str, list[float]] = {name: [] for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for step in range(settings.steps):
        input, target = distributed.share(batch_at(step))
        batch = input.to(settings.device), target.to(settings.device)
        for name in NAMES if step % 2 == 0 else reversed(NAMES):
            _synchronise(settings.device)
            start = time.perf_counter()
            loss_tensor = _training_step(trained[name], optimizers[name], batch, loss_function)
            _synchronise(settings.device)
            seconds[name].append(time.perf_counter() - start)
            loss = distributed.joined(loss_tensor)
            if not math.isfinite(loss):
                message = f"the loss of {name} is {loss} at step {step + 1}: try a smaller --lr"
                raise DemoError(message, exit_code=1)
            losses[name].append(loss)
            on_step(Progress(name, step + 1, loss, seconds[name][-1]))
    return losses, seconds


def _synchronise(device: torch.device) -> None:
    # A GPU works on after the call returned; without this only the launches would be timed.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
