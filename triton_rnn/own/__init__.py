"""A cell of one's own: from a pointwise function of torch operations to a module on the C loops.

`trace` runs the function once and records what it does, as expressions (`expression`); `program`
derives the backward from these; `backends.native.own` writes both down in C. `module` is what a
user subclasses, `call` takes its calls apart, and `ready` holds two cells made this way.
"""
