"""Keywords of RNN, GRU and LSTM that say how layers stand on each other and what they remember."""

from typing import Any

import torch

from triton_rnn import compiled, functional, recompute


class Stacking(torch.nn.RNNBase):
    """What the three classes have beyond torch.nn's; their `forward` asks for `_stacking` first.

    Attributes:
        recompute: see `recompute_steps`.
    """

    # Of the class, so that modules that torch.nn made and old pickles have them too. `_stacking`
    # is whether any is set, so that a plain call asks one question.
    _stacking = False
    _recompute: bool | int = False

    def __init__(self, *args: Any, recompute: bool | int = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if recompute is not False:
            self.recompute = recompute

    @property
    def recompute(self) -> bool | int:
        """Whether a backward goes forward again by segments, so that training takes less memory.

        False, True for segments of about the square root of the number of steps, or the number of
        steps of a segment. It may be set at any time. Outputs are the same numbers; gradients of
        the input and the states too, on the backend `native` bit for bit, and those of weights but
        for the order in which the segments' are added.

        Raises:
            ValueError: when it is set, for anything else.
        """
        return self._recompute

    @recompute.setter
    def recompute(self, value: bool | int) -> None:
        if type(value) not in (bool, int) or (type(value) is int and value < 1):
            raise ValueError(
                f"recompute is True, False or a number of steps, at least 1, not {value!r}"
            )
        self._recompute = value
        self._stacking = value is not False

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        return shown + (f", recompute={self._recompute}" if self._recompute else "")


def forward(module: Any, input: Any, hx: Any) -> tuple[Any, Any] | None:
    """The call of a module with any of the keywords; None if torch.nn's forward shall say why not.

    Raises:
        BackendError: if the call cannot be made with them.
    """
    wanted = module.recompute
    if wanted is False or not torch.is_grad_enabled():
        return functional.forward(module, input, hx)
    return recompute.forward(module, input, hx, 0 if wanted is True else wanted)


compiled.leave_to_python(forward)
