"""A cell of one's own: from a pointwise function of torch operations to a module on fast loops.

`trace` runs the function once and records what it does, as expressions (`expression`); `program`
derives the backward from these; `backends.native.own` writes both down in C, `backends.triton.own`
in Triton. `module` is what a user subclasses, `call` takes its calls apart, and `ready` holds two
cells made this way.
"""
