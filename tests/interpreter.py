"""Runs the kernels of a module under Triton's interpreter, on CPU tensors, without a word to the rest of the process.

TRITON_INTERPRET=1 must be set before Triton is imported and holds for the whole process, which could then compile nothing ahead of
time. Instead every `@triton.jit` function that a kernel can reach is replaced, for a while, by its interpreted form: those of its
own module and those that Triton's language is written in (`tl.sum`).
"""

import contextlib

import triton.experimental.gluon  # noqa: F401  Triton imports it at the first launch and checks there that nothing is replaced
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


@contextlib.contextmanager
def interpreted(*modules):
    """Within, the kernels of `modules` run interpreted. Their launchers must look them up in the module at every call."""
    kept, twins = [], {}
    for module in (tl, tl.standard, *modules):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                kept.append((module, name, value))
                setattr(module, name, twins.setdefault(id(value), InterpretedFunction(value.fn)))
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
