"""Runs the kernels of a module under Triton's interpreter, on CPU tensors, without a word to the rest of the process.

TRITON_INTERPRET=1 must be set before Triton is imported and holds for the whole process, which could then compile nothing ahead of
time. Instead the `@triton.jit` functions of a module are replaced, for a while, by their interpreted form, and Triton's language is
patched for the length of a launch only.
"""

import contextlib
import functools
import sys
import types

import triton.experimental.gluon  # noqa: F401  Triton imports it at the first launch and checks there that nothing is replaced
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, _patch_lang
from triton.runtime.jit import JITFunction


@contextlib.contextmanager
def interpreted(*modules):
    """Within, the kernels of `modules` run interpreted, and so do the jit functions of other modules that they import.

    Launchers must look their kernels up in the module at every call. A context manager, and a decorator of test functions.
    """
    with _replaced(_with_imports(modules)):
        yield


class _Interpreted(InterpretedFunction):
    def run(self, *args, grid, warmup, **kwargs):
        # tl.sum and its like are jit functions, written in tl.core, which Triton's own patch of the language would not restore.
        language = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        with _replaced((tl, tl.standard)):
            patch = _patch_lang(language)
            try:
                return super().run(*args, grid=grid, warmup=warmup, **kwargs)
            finally:
                patch.restore()

    def __call__(self, *args, **kwargs):
        # A kernel's call of another function: the base class would patch the language anew for each, slowly, and restore nothing.
        return self.rewrite()(*args, **kwargs)


@functools.cache
def _twin(function):
    return _Interpreted(function)


@contextlib.contextmanager
def _replaced(modules):
    kept = [(module, name, value) for module in modules for name, value in vars(module).items() if isinstance(value, JITFunction)]
    for module, name, value in kept:
        setattr(module, name, _twin(value.fn))
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def _with_imports(modules):
    """The modules and those that their jit functions come from, to the last."""
    found, new = {}, dict.fromkeys(modules)
    while new:
        found |= new
        functions = [value for module in new for value in vars(module).values() if isinstance(value, JITFunction)]
        new = {sys.modules[function.fn.__module__]: None for function in functions}
        new = {module: None for module in new if module not in found}
    return tuple(found)
