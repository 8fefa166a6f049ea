"""The base class of a module over a user's cell. It holds the weights, and no arithmetic."""

import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from triton_rnn import dispatch, symbolic
from triton_rnn.cells import OwnCell
from triton_rnn.own import call, program, trace

# The C loops hold a vector of each in registers.
MOST = 8


def _count(told: str, name: str, value: object, least: int) -> int:
    if type(value) is not int or not least <= value <= MOST:
        raise ValueError(f"{told}: {name} should be a whole number from {least} to {MOST}")
    return value


def _build(told: str, step: Callable[..., Any], sizes: dict[str, int]) -> OwnCell:
    graph, results = trace.trace(step, f"{told}.step", **sizes)
    derived = program.derive(graph, results, **sizes)
    return OwnCell(
        told,
        gates=sizes["gates"],
        states=sizes["states"],
        products=sizes["products"],
        unit_weights=sizes["unit_weights"],
        step=step,
        program=derived,
    )


def _check_arguments(
    input_size: object,
    hidden_size: object,
    num_layers: object,
    bias: object,
    batch_first: object,
    dropout: Any,
    bidirectional: object,
) -> None:
    """Refuse what torch.nn's constructors refuse, and what makes their calls fail later."""
    number = isinstance(dropout, numbers.Number) and not isinstance(dropout, bool)
    if not number or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element "
            "being zeroed"
        )
    for name, value in (
        ("bias", bias),
        ("batch_first", batch_first),
        ("bidirectional", bidirectional),
    ):
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    for name, size in (
        ("input_size", input_size),
        ("hidden_size", hidden_size),
        ("num_layers", num_layers),
    ):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"{name} must be greater than zero")
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            "dropout option adds dropout after all but last recurrent layer, so non-zero dropout "
            f"expects num_layers greater than 1, but got dropout={dropout} and num_layers=1",
            stacklevel=3,
        )


class Recurrent(torch.nn.Module):
    r"""A recurrent module over a cell of one's own: subclass it and write one pointwise step.

    >>> class MinimalGatedUnit(triton_rnn.Recurrent, gates=2):
    ...     @staticmethod
    ...     def step(input, hidden, state):
    ...         (h,) = state
    ...         f = torch.sigmoid(input[0] + hidden[0])
    ...         n = torch.tanh(input[1] + f * hidden[1])
    ...         return (1 - f) * h + f * n
    >>> output, h_n = MinimalGatedUnit(16, 128, num_layers=2, bidirectional=True)(input)

    The subclass has torch.nn.LSTM's constructor, call, shapes and names of parameters. The step is
    traced when the class is defined, its backward is derived, and both are compiled at the module's
    first call: on a CPU, float32 and float64, as one C loop over time; on a GPU, float16, bfloat16
    and float32, with one or two states, as the package's Triton kernels. Elsewhere the step runs in
    a plain loop (backend ``"reference"``), which can be differentiated any number of times and is
    the definition.

    **The step** is a static method of tuples of (N, H) tensors, for one layer at one time:

    * ``input``: G of them, the parts of ``weight_ih @ x + bias_ih``;
    * ``hidden``: the parts of ``weight_hh @ h + bias_hh``, as many as ``products`` says;
    * ``state``: h, and then whatever else is carried from step to step;
    * ``unit``, only if there are ``unit_weights``: that many learned (H,) vectors.

    It returns the next states in the same order (or one tensor, if there is one); the first, h, is
    the module's output. It may be written in any torch operations that are pointwise: arithmetic,
    sigmoid, tanh, exp, log, sqrt, sin, erf, abs, clamp, where, comparisons, the usual activations
    of torch.nn.functional, Python numbers.

    Class arguments:
        gates: G, 1 to 8.
        states: how many states are carried, 1 to 8. With one, ``hx`` and the returned state are a
            tensor as those of torch.nn.GRU, else a tuple as those of torch.nn.LSTM.
        products: how many gates have a part of the recurrent product, 0 to 8; G if not given. With
            0 there is neither weight_hh nor bias_hh, and the step costs no matrix product.
        unit_weights: how many vectors are learned for each hidden unit, 0 to 8.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as torch.nn.LSTM's.

    Attributes:
        weight_ih_l[k], weight_hh_l[k], bias_ih_l[k], bias_hh_l[k]: as torch.nn.LSTM's, of G and of
            ``products`` times hidden_size rows.
        weight_unit_l[k]: (unit_weights, hidden_size), if there are any. All are drawn from
            U(-1/sqrt(hidden_size), 1/sqrt(hidden_size)); of the reverse direction with the suffix
            ``_reverse``.

    Raises:
        ValueError: when the class is defined: the step is not pointwise, or does something that has
            no derivative here; the message names the operator.
    """

    cell: ClassVar[OwnCell]

    def __init_subclass__(
        cls,
        gates: int | None = None,
        states: int | None = None,
        products: int | None = None,
        unit_weights: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        given = {"gates": gates, "states": states, "products": products}
        given["unit_weights"] = unit_weights
        inherited = getattr(cls, "cell", None)
        if inherited is not None and "step" not in cls.__dict__ and set(given.values()) == {None}:
            return
        told = cls.__qualname__
        if gates is None and inherited is None:
            raise TypeError(f"class {told}(Recurrent) needs the number of its gates: gates=...")
        for name, otherwise in (("gates", None), ("states", 1), ("unit_weights", 0)):
            if given[name] is None:
                given[name] = otherwise if inherited is None else getattr(inherited, name)
        if products is None:
            kept = inherited is not None and gates is None
            given["products"] = inherited.products if kept and inherited else given["gates"]
        least = {"gates": 1, "states": 1, "products": 0, "unit_weights": 0}
        sizes = {name: _count(told, name, given[name], least[name]) for name in least}
        if not isinstance(cls.__dict__.get("step"), staticmethod) and "step" in cls.__dict__:
            raise TypeError(f"{told}.step should be a staticmethod: it is given no module")
        cls.cell = _build(cls.__name__, cls.step, sizes)

    @staticmethod
    def step(*arguments: Any) -> Any:
        """One time step of one layer, pointwise; a subclass's own."""
        raise TypeError("a subclass of triton_rnn.Recurrent defines its step")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if not hasattr(type(self), "cell"):
            raise TypeError("triton_rnn.Recurrent has no cell: subclass it")
        super().__init__()
        _check_arguments(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        for name, shape in call.parameter_shapes(self).items():
            empty = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, torch.nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters from U(-1/sqrt(hidden_size), 1/sqrt(hidden_size)), as torch does."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            torch.nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        shown = f"{self.input_size}, {self.hidden_size}"
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
        }
        for name, default in defaults.items():
            if getattr(self, name) != default:
                shown += f", {name}={getattr(self, name)}"
        return shown

    def flatten_parameters(self) -> None:
        """Nothing to do; torch.nn's recurrent modules have it for cuDNN."""

    def forward(
        self,
        input: Any,
        hx: Tensor | tuple[Tensor, ...] | None = None,
        *,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
        reset_to: str = "zeros",
    ) -> tuple[Any, Tensor | tuple[Tensor, ...]]:
        """Run all layers over a batch of sequences.

        Args:
            input: (T, N, I); (N, T, I) if batch_first; (T, I) for one sequence; or a
                PackedSequence.
            hx: each state (L * D, N, H), or (L * D, H) for one sequence: a tensor if the cell has
                one state, else a tuple. Zeros if not given.
            lengths, reset_mask, reset_to: as for RNN, GRU and LSTM, see `extended.forward`; every
                episode is a sequence of a packed batch.

        Returns:
            output (T, N, D * H), in the form of the input, and the last states in that of hx.

        Raises:
            RuntimeError, ValueError, AttributeError: as torch.nn.LSTM does for malformed arguments.
            TypeError, ValueError: for lengths and resets that are not those of this batch.
            BackendError: a backend was asked for by name that cannot run the call.
        """
        tracer = None if type(input) is Tensor and hx is None else symbolic.tracer_of(input, hx)
        if tracer is not None:
            more = {"lengths": lengths, "reset_mask": reset_mask, "reset_to": reset_to}
            return symbolic.leaf(tracer, self, input, hx, **more)
        run = call.forward
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting() and (lengths is not None or reset_mask is not None):
                raise dispatch.BackendError("lengths and resets cannot be exported")
            call.break_graphs()
            run = call.outside_of_graphs
        if lengths is None and reset_mask is None and reset_to == "zeros":
            return run(self, input, hx)
        return run(self, input, hx, (lengths, reset_mask, reset_to))
