"""What the steps of a layer can be given beside its weights: one record, the same for all backends.

A backend that `TAKES_EXTRAS` knows all of it; the definition is `reference.extended_layer`.
"""

from typing import NamedTuple

from torch import Tensor


class Extras(NamedTuple):
    """What one layer's steps are given; each field's default is nothing.

    Attributes:
        lengths: (N,) int64 on the CPU, steps of each sequence of a padded batch, 0 to T.
        reset_mask: (T, N) bool, where a sequence starts anew before the step; in the reverse
            direction after it, so that both see the same episodes.
        reset_to_initial: whether it starts with h_0 and c_0; else with zeros.
        recurrent_mask: (D, N, H_out), what h is multiplied by before W_hh multiplies it.
        zoneout_h: (T, N, D * H_out) bool, or as the rows of a packed batch: what of h stays as it
            was before the step; or a number, the part of it that stays. 0.0 for none.
        zoneout_c: (T, N, D * H) likewise, of c.
        clip_hidden: the largest absolute value of h; 0.0 for any.
        clip_cell: the largest absolute value of c; 0.0 for any. h is made of the clipped c.
        all_cells: whether c after every step is a result.
    """

    lengths: Tensor | None = None
    reset_mask: Tensor | None = None
    reset_to_initial: bool = False
    recurrent_mask: Tensor | None = None
    zoneout_h: Tensor | float = 0.0
    zoneout_c: Tensor | float = 0.0
    clip_hidden: float = 0.0
    clip_cell: float = 0.0
    all_cells: bool = False
