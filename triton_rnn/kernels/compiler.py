"""What differs between the versions of Triton that compile the kernels (3.6 to 3.9)."""

import triton

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Of what a thread has joined, a matrix instruction's operand takes pairs of float32 that lie side
# by side; since 3.8 single ones.
FLOAT32_IN_PAIRS = _VERSION < (3, 8)

# On data-centre Blackwell even products of eight columns are made in a memory of their own.
NARROW_PRODUCTS_APART = _VERSION >= (3, 8)
