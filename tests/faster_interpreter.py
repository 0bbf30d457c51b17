"""Triton's interpreter, mended, and without work that changes no result: twice as fast."""

import inspect
from functools import cache

import numpy as np
from triton.language import core
from triton.runtime import interpreter


@cache
def _names_of_builtins(package: object) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]


def _patch_builtin(package: object, *others: object) -> None:
    """Replaces the language's functions; Triton's own looks for them anew at each call of a helper.

    Those that are replaced already are no builtins any more, and stay as they are.
    """
    for name in _names_of_builtins(package):
        member = getattr(package, name)
        if core.is_builtin(member):
            interpreter._patch_attr(package, name, member, *others)


_own_splat = interpreter.InterpreterBuilder.create_splat


def _create_splat(
    self: interpreter.InterpreterBuilder, wanted: core.block_type, scalar: interpreter.TensorHandle
) -> interpreter.TensorHandle:
    """Truth values stay so: Triton's own makes integers of them, which 3.9 takes for no mask."""
    tensor = _own_splat(self, wanted, scalar)
    if scalar.data.dtype == np.bool_:
        tensor.data = tensor.data.astype(np.bool_)
    return tensor


def install() -> None:
    interpreter.InterpreterBuilder.create_splat = _create_splat
    interpreter._patch_builtin = _patch_builtin
    # Whether integers overflow is computed at every operation, but asserted with `debug` alone.
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
