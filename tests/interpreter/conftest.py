"""Kernels under Triton's interpreter: nothing here runs, or is collected, in any other process.

`tests/test_triton_interpreter.py` starts the process: triton reads TRITON_INTERPRET when it is
first imported, and a process with it can compile no kernel.
"""

import functools
import os
from dataclasses import replace

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["*"]

if INTERPRETED:
    import numpy as np
    import torch
    from triton.runtime import interpreter

    from triton_rnn import health
    from triton_rnn.backends.triton import launch

    class _Nothing:
        def restore(self):
            pass

    @pytest.fixture(autouse=True, scope="session")
    def nothing_in_vain():
        """A quarter of the interpreter's time goes into two things that change no result: it asks
        of every sum of integers whether 64 bits would come to another, and without `debug` throws
        the answer away; and it builds a table of numpy's types anew for every tensor."""
        options, dtype_of = interpreter.interpreter_builder.options, interpreter._get_np_dtype
        known = functools.cache(dtype_of)
        pointer = dtype_of(interpreter.tl.pointer_type(interpreter.tl.int8))
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
        interpreter._get_np_dtype = lambda dtype: (
            pointer if dtype.scalar.is_ptr() else known(dtype.scalar)
        )
        yield
        interpreter.interpreter_builder.options = options
        interpreter._get_np_dtype = dtype_of

    def _remembering(kind, key_of, own=()):
        """An __init__ that gives an object what the first one of the same key was given.

        Args:
            key_of: what the attributes depend on, by the arguments. own: those that are an object's
                own, which are the first arguments.
        """
        original, known = kind.__init__, {}

        def __init__(self, *args):
            key = key_of(*args)
            found = known.get(key)
            if found is None:
                original(self, *args)
                known[key] = {name: v for name, v in vars(self).items() if name not in own}
            else:
                self.__dict__.update(found)
                self.__dict__.update(zip(own, args, strict=False))

        return __init__

    @pytest.fixture(autouse=True, scope="session")
    def types_made_once():
        """A fifth of the time: types and shapes, which are made anew for every tensor."""
        core = interpreter.tl.core
        block_type, tensor = core.block_type.__init__, core.tensor.__init__
        core.block_type.__init__ = _remembering(
            core.block_type,
            lambda element, shape: (element.name, *(getattr(s, "value", s) for s in shape)),
        )
        core.tensor.__init__ = _remembering(
            core.tensor, lambda handle, type: type.name, own=("handle", "type")
        )
        yield
        core.block_type.__init__, core.tensor.__init__ = block_type, tensor

    @pytest.fixture(autouse=True, scope="session")
    def language_patched_once():
        """The interpreter patches the language at every call of a device function, a third of its
        time; once for each file is enough, for no kernel is compiled in this process."""
        patch, done = interpreter._patch_lang, {}

        def patch_once(function):
            # By the file's names, not the function: they say which modules are the language.
            if id(function.__globals__) not in done:
                scope = done[id(function.__globals__)] = patch(function)
                # Triton 3.6 makes a number of an array of one element, which numpy gives up.
                scope.set_attr(
                    interpreter.tl.tensor, "__index__", lambda self: int(self.handle.data.item())
                )
            return _Nothing()

        interpreter._patch_lang = patch_once
        yield
        interpreter._patch_lang = patch
        for scope in reversed(done.values()):
            scope.restore()

    @pytest.fixture(autouse=True)
    def quiet_arithmetic():
        """exp may overflow and NaN be compared: a GPU says nothing, numpy would warn."""
        with np.errstate(all="ignore"):
            yield

    @pytest.fixture(autouse=True)
    def no_failures_left(monkeypatch):
        """Each test begins and ends without a failed wait."""
        monkeypatch.setattr(health, "_failures", {})
        yield
        words = launch._error_words(torch.device("cpu"))
        left = words.tolist()
        words.zero_()
        assert not any(left), f"a wait failed and nobody asked: {left}"

    @pytest.fixture(params=["resident", "stepwise"])
    def variant(request, monkeypatch):
        """Every variant of the kernels that needs no programs side by side."""
        monkeypatch.setattr(launch, "variant", request.param)
        return request.param

    @pytest.fixture
    def poisoned():
        """Every empty floating tensor is full of NaN within the test (see tests/test_poison.py)."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        fill = torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
